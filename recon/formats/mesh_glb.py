"""GLB meshes: one mesh with a morph target a frame, played by an animation; or a still.

glTF is right, up, back.  Between frames a vertex goes straight, as in the other formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2 import __version__
from d2.recon.formats import glb, values
from d2.recon.mesh import Mesh

_FLOAT, _UINT = 5126, 5125
_ARRAY, _ELEMENTS = 34962, 34963  # what a buffer view is for


def encode(
    meshes: Sequence[Mesh],  # [F] with the same triangles, right up back
    fps: float,
    name: str = "asset",
) -> bytes:
    """The bytes of a GLB file.  Frame k is at k / fps seconds; the mesh itself is frame 0."""
    first = meshes[0]
    file = _File()
    primitive: dict[str, Any] = {
        "attributes": {
            "POSITION": file.add(first.vertices, _ARRAY, bounds=True),
            "COLOR_0": file.add(values.linear(first.colors), _ARRAY),
        },
        "indices": file.add(first.triangles.reshape(-1, 1), _ELEMENTS, kind="<u4"),
        "material": 0,
    }
    mesh: dict[str, Any] = {"name": name, "primitives": [primitive]}
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"d2 {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [mesh],
        "materials": [{"name": name, "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}}],
    }
    if len(meshes) > 1:
        deltas = [m.vertices - first.vertices for m in meshes[1:]]
        primitive["targets"] = [{"POSITION": file.add(delta, _ARRAY, bounds=True)} for delta in deltas]
        mesh["weights"] = [0] * len(deltas)
        mesh["extras"] = {"targetNames": [f"frame_{k:04d}" for k in range(2, len(meshes) + 1)]}
        seconds = file.add(np.arange(len(meshes))[:, None] / fps, bounds=True)
        weights = file.add(np.eye(len(meshes))[:, 1:].reshape(-1, 1))
        document["animations"] = [
            {
                "name": name,
                "samplers": [{"input": seconds, "output": weights, "interpolation": "LINEAR"}],
                "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}],
            }
        ]
    return glb.pack(document | file.parts(), file.binary())


class _File:
    """Accessors, each with a tightly packed view of its own."""

    def __init__(self) -> None:
        self._accessors: list[dict[str, Any]] = []
        self._views: list[dict[str, Any]] = []
        self._arrays: list[np.ndarray] = []

    def add(self, array: np.ndarray, target: int | None = None, bounds: bool = False, kind: str = "<f4") -> int:
        """Takes [n, width] values; returns the accessor's index."""
        array = np.ascontiguousarray(array, kind)
        offset = sum(a.nbytes for a in self._arrays)
        view = {"buffer": 0, "byteOffset": offset, "byteLength": array.nbytes}
        accessor: dict[str, Any] = {
            "bufferView": len(self._views),
            "componentType": _UINT if kind == "<u4" else _FLOAT,
            "count": len(array),
            "type": {1: "SCALAR", 3: "VEC3"}[array.shape[1]],
        }
        if bounds:
            accessor |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
        self._views.append(view if target is None else view | {"target": target})
        self._accessors.append(accessor)
        self._arrays.append(array)
        return len(self._accessors) - 1

    def parts(self) -> dict[str, Any]:
        size = sum(array.nbytes for array in self._arrays)
        return {"accessors": self._accessors, "bufferViews": self._views, "buffers": [{"byteLength": size}]}

    def binary(self) -> bytes:
        return b"".join(array.tobytes() for array in self._arrays)
