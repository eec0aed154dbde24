"""4D Gaussians as the viewer's bytes: 28 a Gaussian, near neighbours together, byte planes, gzip.

A record is seven 32-bit words (ten with spherical harmonics of degree 1), quantised in ranges that the header
names.  The vertex shader of page/gl.js and the sorter of page/sort.js read them as they are:

    0  x, y in the box, 16 bits each              4  the three smaller quaternion components, 10 bits each,
    1  z in the box, time                            and which one was left out
    2  velocity x, y as half floats               5  ln of the scales, 10 bits each
    3  velocity z, 1 / duration as half floats    6  red, green, blue, opacity, 8 bits each
                                                  7-9  degree 1: red, green, blue of a basis function, 10 bits each
"""

from __future__ import annotations

import gzip
import json
import struct
from typing import Any, NamedTuple

import numpy as np

from d2.errors import InputError
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import sh

MAGIC = b"D2V1"
WORDS = {0: 7, 1: 10}  # 32-bit words a Gaussian, by degree of the spherical harmonics
ALPHA_MIN = 1 / 255  # what no pixel can show is left out, as the rasterizers do
COLOR_LIMIT = 2.0  # base colours are kept within ±2; 8 bits over more would show steps
MAX_HALF = 60000.0  # below the largest half float, rounded too
# Low bits that are left zero, for gzip to find: of 16 of a place and of the time, of 10 of a half float's fraction.
PLACE_ZEROS, TIME_ZEROS, HALF_ZEROS = 2, 4, 3
_MORTON_BITS = 10  # an axis


class Ranges(NamedTuple):
    """What the ends of the integer scales stand for."""

    box_min: np.ndarray  # [3] world
    box_size: np.ndarray  # [3] world
    time: tuple[float, float]  # least, extent; wider than 0..1, for Gaussians whose peak lies outside
    log_scale: tuple[float, float]
    color: tuple[float, float]
    sh: float  # coefficients of degree 1 lie within ± this


def pack(gaussians: Gaussians4D, degree: int = 0) -> bytes:
    """The whole asset as one binary: magic, length of the header, header (JSON), gzip of the byte planes.

    `degree` of the spherical harmonics is 0 or 1; coefficients beyond are left out.  The same Gaussians give the
    same bytes.  Raises InputError when there is nothing to see or the degree is not known.
    """
    if degree not in WORDS:
        raise InputError(f"the viewer draws spherical harmonics of degree 0 or 1, not {degree}")
    values = _values(gaussians, min(degree, gaussians.sh_degree))
    ranges = _ranges(values)
    order = _morton_order(values["means"], ranges)
    records = _records({name: array[order] for name, array in values.items()}, ranges)
    header = _header(records, ranges)
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    planes = np.ascontiguousarray(records.view(np.uint8).reshape(len(records), -1).T)
    return MAGIC + struct.pack("<I", len(text)) + text + gzip.compress(planes.tobytes(), 9, mtime=0)


def _values(gaussians: Gaussians4D, degree: int) -> dict[str, np.ndarray]:
    """Activated values of those that can be seen at some moment, float64."""
    raw = {name: tensor.detach().cpu().double().numpy() for name, tensor in gaussians.tensors().items()}
    opacities = 1 / (1 + np.exp(-raw["opacity_logits"]))
    durations = np.exp(raw["log_durations"])
    away = raw["times"] - raw["times"].clip(0, 1)  # from the nearest moment of the clip
    seen = opacities * np.exp(-0.5 * (away / durations) ** 2) >= ALPHA_MIN
    if not seen.any():
        raise InputError("nothing to show: every Gaussian is fainter than 1/255 at all times")
    coefficients = raw["sh"][:, : sh.bases(degree)]
    values = {
        "means": raw["means"], "velocities": raw["velocities"], "times": raw["times"],
        "inverse_durations": np.minimum(1 / durations, MAX_HALF),
        "quats": raw["quats"] / np.linalg.norm(raw["quats"], axis=1, keepdims=True),
        "log_scales": raw["log_scales"], "opacities": opacities,
        "colors": sh.C0 * coefficients[:, 0] + 0.5, "sh": coefficients[:, 1:],
    }  # fmt: skip
    return {name: array[seen] for name, array in values.items()}


def _ranges(values: dict[str, np.ndarray]) -> Ranges:
    means, colors, rest = values["means"], values["colors"], values["sh"]
    # Without view dependence a negative colour is black; with it, the rest may lift it.
    lowest = float(np.clip(colors.min(), -COLOR_LIMIT, 0)) if rest.size else 0.0
    highest = float(np.clip(colors.max(), 1, COLOR_LIMIT))
    return Ranges(
        means.min(0),
        np.ptp(means, axis=0) + 1e-9,
        _extent(values["times"]),
        _extent(values["log_scales"]),
        (lowest, highest - lowest),
        float(np.abs(rest).max()) if rest.size else 0.0,
    )


def _extent(array: np.ndarray) -> tuple[float, float]:
    return float(array.min()), max(float(np.ptp(array)), 1e-6)


def _records(values: dict[str, np.ndarray], ranges: Ranges) -> np.ndarray:  # [N, words] uint32
    place = _rounded(_steps((values["means"] - ranges.box_min) / ranges.box_size, 16), PLACE_ZEROS)
    time = _rounded(_steps((values["times"] - ranges.time[0]) / ranges.time[1], 16), TIME_ZEROS)
    velocity = _half(values["velocities"])
    words = [
        place[:, 0] | place[:, 1] << 16,
        place[:, 2] | time << 16,
        velocity[:, 0] | velocity[:, 1] << 16,
        velocity[:, 2] | _half(values["inverse_durations"]) << 16,
        _packed_quats(values["quats"]),
        _three_tens(_steps((values["log_scales"] - ranges.log_scale[0]) / ranges.log_scale[1], 10)),
    ]
    low, extent = ranges.color
    rgba = _steps(np.column_stack([(values["colors"] - low) / extent, values["opacities"]]), 8)
    words.append(rgba[:, 0] | rgba[:, 1] << 8 | rgba[:, 2] << 16 | rgba[:, 3] << 24)
    coefficients = _steps(values["sh"] / max(ranges.sh, 1e-9) / 2 + 0.5, 10)
    words += [_three_tens(coefficients[:, k]) for k in range(coefficients.shape[1])]
    return np.ascontiguousarray(np.column_stack(words), dtype="<u4")


def _steps(fractions: np.ndarray, bits: int) -> np.ndarray:
    """0..1 as integers of so many bits."""
    top = (1 << bits) - 1
    return np.clip(np.rint(fractions * top), 0, top).astype(np.uint32)


def _half(values: np.ndarray) -> np.ndarray:
    """Bits of half floats, their fractions rounded; a carry into the exponent is right."""
    bits = np.clip(values, -MAX_HALF, MAX_HALF).astype(np.float16).view(np.uint16).astype(np.uint32)
    return _rounded(bits, HALF_ZEROS)


def _rounded(bits: np.ndarray, zeros: int) -> np.ndarray:
    """16-bit numbers to the nearest that ends in so many zeros."""
    return np.minimum(bits + (1 << zeros - 1) >> zeros << zeros, 0xFFFF >> zeros << zeros)


def _three_tens(steps: np.ndarray) -> np.ndarray:  # [N, 3] -> [N]
    return steps[:, 0] | steps[:, 1] << 10 | steps[:, 2] << 20


def _packed_quats(quats: np.ndarray) -> np.ndarray:  # [N, 4] wxyz, unit -> [N]
    """q and -q turn alike, so the largest component is made positive and left out: |others| ≤ √½."""
    largest = np.abs(quats).argmax(1)
    quats = quats * np.where(quats[np.arange(len(quats)), largest] < 0, -1, 1)[:, None]
    others = quats[np.arange(4) != largest[:, None]].reshape(-1, 3)
    return _three_tens(_steps(others / np.sqrt(2) + 0.5, 10)) | largest.astype(np.uint32) << 30


def _morton_order(means: np.ndarray, ranges: Ranges) -> np.ndarray:
    """Along a curve that interleaves the bits of x, y, z: neighbours in space compress together."""
    cells = _steps((means - ranges.box_min) / ranges.box_size, _MORTON_BITS)
    code = np.zeros(len(means), np.uint32)
    for bit in range(_MORTON_BITS):
        for axis in range(3):
            code |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return np.argsort(code, kind="stable")


def _header(records: np.ndarray, ranges: Ranges) -> dict[str, Any]:
    return {
        "count": len(records),
        "words": records.shape[1],
        "box": [*ranges.box_min.tolist(), *ranges.box_size.tolist()],
        "time": list(ranges.time),
        "scale": list(ranges.log_scale),
        "color": list(ranges.color),
        "sh": ranges.sh,
    }
