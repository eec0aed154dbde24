"""GLB with KHR_gaussian_splatting: one moment as glTF points that carry splats.

Written against the extension's release candidate.  Viewers without it draw the points in COLOR_0.  glTF is
right, up, back, and the extension has no animation.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2 import __version__, fileio
from d2.errors import InputError
from d2.recon.cameras import Track
from d2.recon.formats import values
from d2.recon.formats.frames import FROM_WORLD, from_frame, to_frame
from d2.recon.formats.values import Values
from d2.recon.gaussians import MAX_GAUSSIANS, Gaussians3D, quaternions
from d2.recon.raster import sh as spherical

EXTENSION = "KHR_gaussian_splatting"
JSON_CAP = 16 << 20  # bytes of the JSON chunk
_MAGIC, _JSON, _BIN = 0x46546C67, 0x4E4F534A, 0x004E4942
_FLOAT = 5126
_WIDTH = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}


def write(gaussians: Gaussians3D, path: str | Path) -> None:
    """Writes one moment, whole or not at all; the errors are those of `encode`."""
    fileio.atomic_write(path, encode(gaussians))


def encode(gaussians: Gaussians3D) -> bytes:
    """The bytes of a GLB file, from Gaussians in our world.

    Raises InputError when there is nothing to write and NumericalError when a value is NaN or infinite.
    """
    v = values.of(to_frame(gaussians, "rub"))
    columns = _columns(v)
    accessors, views, offset = [], [], 0
    for array in columns.values():
        kind = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[array.shape[1]]
        accessors.append({"bufferView": len(views), "componentType": _FLOAT, "count": len(array), "type": kind})
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": array.nbytes, "target": 34962})
        offset += array.nbytes
    accessors[0] |= {"min": columns["POSITION"].min(0).tolist(), "max": columns["POSITION"].max(0).tolist()}
    how = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display", "projection": "perspective",
           "sortingMethod": "cameraDistance"}  # fmt: skip
    document = {
        "asset": {"version": "2.0", "generator": f"d2 {__version__}"},
        "extensionsUsed": [EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "splats"}],
        "meshes": [
            {
                "primitives": [
                    {
                        "mode": 0,
                        "attributes": {name: index for index, name in enumerate(columns)},
                        "extensions": {EXTENSION: how},
                    }
                ]
            }
        ],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": offset}],
    }
    return pack(document, b"".join(array.tobytes() for array in columns.values()))


def encode_cameras(
    tracks: Sequence[Track],
    times: np.ndarray,  # [F] in 0..1 of the clip
    fps: float,
) -> bytes:
    """A GLB of perspective cameras; a moving one is animated, frame k of the clip at k / fps seconds.

    glTF knows no lens shift and no zoom: a principal point beside the middle is left out, and the first focal
    length holds.
    """
    rotation, binary = FROM_WORLD["rub"], b""
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"d2 {__version__}"},
        "scene": 0, "scenes": [{"nodes": list(range(len(tracks)))}], "nodes": [], "cameras": [],
    }  # fmt: skip
    for track in tracks:
        K, poses = track.Ks[0], track.turned(rotation)
        near = 0.001 * float(np.linalg.norm(poses[:, :3, 3], axis=1).max())
        lens = {"yfov": 2 * math.atan(0.5 * track.height / K[1, 1]), "znear": near}
        lens["aspectRatio"] = track.width * K[1, 1] / (track.height * K[0, 0])
        quats = quaternions(torch.as_tensor(poses[:, :3, :3])).numpy()[:, [1, 2, 3, 0]]
        node = {"camera": len(document["cameras"]), "name": track.name}
        node |= {"translation": poses[0, :3, 3].tolist(), "rotation": quats[0].tolist()}
        document["cameras"].append({"type": "perspective", "name": track.name, "perspective": lens})
        document["nodes"].append(node)
        if len(poses) > 1:
            flips = np.where((quats[1:] * quats[:-1]).sum(1) < 0, -1.0, 1.0).cumprod()  # the short way round
            quats[1:] *= flips[:, None]
            arrays = {
                "SCALAR": np.interp(track.times, times, range(len(times))) / fps,
                "VEC3": poses[:, :3, 3],
                "VEC4": quats,
            }
            binary += _animation(document, len(document["nodes"]) - 1, arrays, len(binary))
    if binary:
        document["buffers"] = [{"byteLength": len(binary)}]
    return pack(document, binary)


def _animation(document: dict[str, Any], node: int, arrays: dict[str, np.ndarray], start: int) -> bytes:
    """Adds the animation of a node: seconds, translations and rotations, whose bytes it returns."""
    views, accessors = document.setdefault("bufferViews", []), document.setdefault("accessors", [])
    first, data = len(accessors), b""
    for kind, array in arrays.items():
        content = np.ascontiguousarray(array, "<f4")
        views.append({"buffer": 0, "byteOffset": start + len(data), "byteLength": content.nbytes})
        accessors.append({"bufferView": len(views) - 1, "componentType": _FLOAT, "count": len(content), "type": kind})
        data += content.tobytes()
    accessors[first] |= {"min": [float(np.float32(arrays["SCALAR"].min()))]}
    accessors[first] |= {"max": [float(np.float32(arrays["SCALAR"].max()))]}
    document.setdefault("animations", []).append(
        {
            "samplers": [{"input": first, "output": first + 1}, {"input": first, "output": first + 2}],
            "channels": [
                {"sampler": 0, "target": {"node": node, "path": "translation"}},
                {"sampler": 1, "target": {"node": node, "path": "rotation"}},
            ],
        }
    )
    return data


def pack(document: dict[str, Any], binary: bytes) -> bytes:
    """A GLB container: the JSON chunk and one binary chunk, each padded to four bytes."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), _JSON) + text
    if binary:
        padded = binary + bytes(-len(binary) % 4)
        chunks += struct.pack("<II", len(padded), _BIN) + padded
    return struct.pack("<III", _MAGIC, 2, 12 + len(chunks)) + chunks


def read(path: str | Path) -> Gaussians3D:
    """Gaussians in our world from the first primitive that carries splats, as float accessors.

    Raises InputError for what is no GLB, holds no splats, or stores them in a way that is not read here
    (quantised, compressed, under a transformed node).
    """
    data, label = values.read_bytes(path)
    document, binary = unpack(data, label)
    try:
        primitive = next(
            p for mesh in document["meshes"] for p in mesh["primitives"] if EXTENSION in p.get("extensions", {})
        )
        moved = any(set(node) & {"matrix", "translation", "rotation", "scale"} for node in document.get("nodes", []))
        if moved or document.get("extensionsRequired"):
            raise InputError(f"{label}: transformed nodes and required extensions are not read")
        names = primitive["attributes"]
        get = {name: _accessor(document, binary, index) for name, index in names.items()}
        found = _values(get)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(f"{label} holds no Gaussians that can be read: {str(error)[:100]}") from error
    return from_frame(values.gaussians(found, label), "rub")


def unpack(data: bytes, label: str) -> tuple[dict[str, Any], bytes]:
    """The JSON document and the binary chunk of a GLB. Raises InputError."""
    if len(data) < 20 or struct.unpack_from("<II", data) != (_MAGIC, 2):
        raise InputError(f"{label} is not a GLB file of version 2")
    size, kind = struct.unpack_from("<II", data, 12)
    if kind != _JSON or size > min(JSON_CAP, len(data) - 20):
        raise InputError(f"{label} is truncated, or its JSON is larger than {JSON_CAP >> 20} MB")
    document = fileio.parse_json(data[20 : 20 + size], label)
    if not isinstance(document, dict):
        raise InputError(f"{label}: the JSON of a GLB must be an object")
    rest = data[20 + size :]
    if len(rest) < 8:
        return document, b""
    size, kind = struct.unpack_from("<II", rest)
    if kind != _BIN or size > len(rest) - 8:
        raise InputError(f"{label} is truncated: its binary chunk announces {size} bytes")
    return document, rest[8 : 8 + size]


def _columns(v: Values) -> dict[str, np.ndarray]:
    """The float32 attributes [N, width] by name; the fallback colour is linear, as glTF's COLOR_0 is."""
    linear = values.linear(0.5 + spherical.C0 * v.sh[:, 0])
    columns = {
        "POSITION": v.means,
        "COLOR_0": np.column_stack([linear, v.opacities]),
        f"{EXTENSION}:ROTATION": v.quats[:, [1, 2, 3, 0]],
        f"{EXTENSION}:SCALE": v.scales,
        f"{EXTENSION}:OPACITY": v.opacities[:, None],
    }
    coefficients = {name: v.sh[:, k] for k, name in enumerate(_sh_names(v.sh.shape[1]))}
    return {name: np.ascontiguousarray(array, "<f4") for name, array in (columns | coefficients).items()}


def _values(get: dict[str, np.ndarray]) -> Values:
    """KeyError for an attribute that lacks, ValueError for lengths that differ."""
    K = next((K for K in (16, 9, 4, 1) if _sh_names(K)[-1] in get), 1)
    quats = get[f"{EXTENSION}:ROTATION"][:, [3, 0, 1, 2]]
    sh = np.stack([get[name] for name in _sh_names(K)], 1)
    found = Values(get["POSITION"], quats, get[f"{EXTENSION}:SCALE"], get[f"{EXTENSION}:OPACITY"][:, 0], sh)
    widths = [array.shape[1:] for array in found]
    if widths != [(3,), (4,), (3,), (), (K, 3)] or len({len(array) for array in found}) != 1:
        raise ValueError(f"attributes of shapes {[array.shape for array in found]}")
    return found


def _sh_names(K: int) -> list[str]:
    degree_and_order = [(math.isqrt(k), k - math.isqrt(k) ** 2) for k in range(K)]
    return [f"{EXTENSION}:SH_DEGREE_{degree}_COEF_{n}" for degree, n in degree_and_order]


def _accessor(document: dict[str, Any], binary: bytes, index: int) -> np.ndarray:
    """A float accessor [N, width]; ValueError for other kinds and for what leaves the buffer."""
    accessor = document["accessors"][_natural(index)]
    view = document["bufferViews"][_natural(accessor["bufferView"])]
    width, count = _WIDTH[accessor["type"]], _natural(accessor["count"])
    start = _natural(view.get("byteOffset", 0)) + _natural(accessor.get("byteOffset", 0))
    tight = view.get("byteStride", 4 * width) == 4 * width and view.get("buffer", 0) == 0 and "sparse" not in accessor
    if accessor["componentType"] != _FLOAT or not tight:
        raise ValueError("only tightly packed float accessors are read")
    if not 0 < count <= MAX_GAUSSIANS or start + 4 * width * count > len(binary):
        raise ValueError(f"an accessor of {count} elements leaves the buffer")
    return np.frombuffer(binary, "<f4", width * count, start).reshape(count, width)


def _natural(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no index")
    return number
