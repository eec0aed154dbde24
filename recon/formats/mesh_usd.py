"""OpenUSD meshes: one animated UsdGeomMesh, with vertex colours and velocities for motion blur (extra `usd`).

What changes from frame to frame is sampled, so a mesh whose triangles stay is stored with them once; where they
change too, every frame has its own, and the velocities alone tell where a vertex goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2.recon.formats import usd, values
from d2.recon.mesh import Mesh


def write(
    meshes: Sequence[Mesh],  # [F], one a frame, in the axes of `up`
    path: str | Path,  # .usd, .usdc or .usda
    fps: float,
    *,
    up: usd.Up = "y",
    name: str = "asset",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the clip as one file, whole or not at all.

    Units are metres; frame k stands at time code k + 1, at `fps` codes a second.  `velocities` are metres a second,
    `displayColor` is linear.  Raises SetupError without usd-core.
    """
    stage = usd.new_stage(len(meshes), fps, up)
    pxr = usd.modules()
    prim = pxr.UsdGeom.Mesh.Define(stage, f"{usd.define_root(stage, name)}/mesh")
    prim.CreateSubdivisionSchemeAttr(pxr.UsdGeom.Tokens.none)
    color = prim.CreateDisplayColorPrimvar(pxr.UsdGeom.Tokens.vertex).GetAttr()
    attributes = {
        "points": prim.CreatePointsAttr(),
        "velocities": prim.CreateVelocitiesAttr(),
        "extent": prim.CreateExtentAttr(),
        "color": color,
        "counts": prim.CreateFaceVertexCountsAttr(),
        "indices": prim.CreateFaceVertexIndicesAttr(),
    }
    fixed = {"counts", "indices"} if _same(meshes, "triangles") else set()
    fixed |= {"color"} if _same(meshes, "colors") else set()
    for index, mesh in enumerate(meshes):
        for what, value in _values(pxr, mesh).items():
            if index == 0:
                attributes[what].Set(value)
            if len(meshes) > 1 and what not in fixed:
                attributes[what].Set(value, usd.FIRST_FRAME + index)
        progress(index + 1, len(meshes))
    usd.save(stage, path, name)


def _same(meshes: Sequence[Mesh], field: str) -> bool:
    return all(getattr(mesh, field) is getattr(meshes[0], field) for mesh in meshes)


def _values(pxr: Any, mesh: Mesh) -> dict[str, Any]:
    vertices = np.ascontiguousarray(mesh.vertices, np.float32)
    vectors = {
        "points": vertices,
        "velocities": mesh.velocities,
        "extent": np.stack([vertices.min(0), vertices.max(0)]),
        "color": values.linear(mesh.colors),
    }
    found = {k: pxr.Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(v, np.float32)) for k, v in vectors.items()}
    return found | {
        "counts": pxr.Vt.IntArray.FromNumpy(np.full(len(mesh.triangles), 3, np.int32)),
        "indices": pxr.Vt.IntArray.FromNumpy(np.ascontiguousarray(mesh.triangles.reshape(-1), np.int32)),
    }
