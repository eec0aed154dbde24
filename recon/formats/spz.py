"""SPZ, Niantic's compressed splats: version 3 written, versions 2 and 3 read.

A gzip stream of a 16-byte header and six planes: positions, opacities, colours, scales, rotations, harmonics.
Axes are right, up, back ("rub").  Errors by design: position half of 2^-12 (finer for small objects), scale
3.2 %, opacity 1/510, colour of degree 0 1/76 in its coefficient, higher degrees 1/256 within ±1.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from d2 import fileio
from d2.errors import InputError
from d2.recon.formats import values
from d2.recon.formats.frames import Frame, from_frame, to_frame
from d2.recon.formats.values import Values
from d2.recon.gaussians import MAX_GAUSSIANS, Gaussians3D
from d2.recon.raster import sh as spherical

MAGIC, VERSION, HEADER = 0x5053474E, 3, struct.Struct("<IIIBBBB")
BITS = 12  # after the binary point of a position: what readers know best; others where 12 do not suit
MIN_EXTENT = 0.25  # world; a smaller object gets finer steps
COLOR_GAIN = 0.15 * 255  # u8 a unit of the degree-0 coefficient
MAX_RATIO = 1032  # deflate expands no further
BYTES_PER_GAUSSIAN = 20  # at degree 0, before gzip


def write(gaussians: Gaussians3D, path: str | Path, frame: Frame = "rub") -> None:
    """Writes one moment, whole or not at all; the errors are those of `encode`."""
    fileio.atomic_write(path, encode(gaussians, frame))


def encode(gaussians: Gaussians3D, frame: Frame = "rub") -> bytes:
    """The bytes of an SPZ file, from Gaussians in our world; equal content gives equal bytes.

    Raises InputError when there is nothing to write or an object is too large to place, NumericalError when a
    value is NaN or infinite.
    """
    v = values.of(to_frame(gaussians, frame))
    bits = _fractional_bits(float(np.abs(v.means).max()))
    header = HEADER.pack(MAGIC, VERSION, len(v.means), spherical.degree_of(v.sh.shape[1]), bits, 0, 0)
    steps = np.round(v.means * 2.0**bits).astype("<i4")
    planes = [
        steps.view(np.uint8).reshape(-1, 3, 4)[..., :3],  # the low 24 bits
        _u8(v.opacities * 255),
        _u8(v.sh[:, 0] * COLOR_GAIN + 127.5),
        _u8((np.log(v.scales) + 10) * 16),
        _pack_smallest_three(v.quats),
        _u8(v.sh[:, 1:] * 128 + 128),
    ]
    return gzip.compress(header + b"".join(plane.tobytes() for plane in planes), mtime=0)


def read(path: str | Path, frame: Frame = "rub") -> Gaussians3D:
    """Gaussians in our world. Raises InputError for what is no SPZ of version 2 or 3, before it is unpacked."""
    data, label = values.read_bytes(path)
    version, count, _degree, bits, content = _unpack(data, label)
    planes = dict(zip(("means", "opacities", "dc", "scales", "quats", "rest"), content, strict=True))
    rotations = planes["quats"].reshape(count, -1)
    rest = planes["rest"].reshape(count, -1, 3)
    dc = (planes["dc"].reshape(count, 1, 3).astype(float) - 127.5) / COLOR_GAIN
    found = Values(
        means=_positions(planes["means"].reshape(count, 3, 3)) / 2.0**bits,
        quats=_unpack_smallest_three(rotations.view("<u4")[:, 0]) if version == 3 else _unpack_first_three(rotations),
        scales=np.exp(planes["scales"].reshape(count, 3) / 16.0 - 10),
        opacities=planes["opacities"] / 255.0,
        sh=np.concatenate([dc, (rest.astype(float) - 128) / 128], 1),
    )
    return from_frame(values.gaussians(found, label), frame)


def _fractional_bits(largest: float) -> int:
    """Bits after the binary point of a signed 24-bit number that hold coordinates up to `largest`."""
    if largest < MIN_EXTENT:
        return BITS + 4
    bits = BITS
    while bits > 0 and round(largest * 2**bits) >= 1 << 23:
        bits -= 1
    if round(largest * 2**bits) >= 1 << 23:
        raise InputError(f"SPZ holds coordinates below {1 << 23}, got {largest:.3g}; use another format")
    return bits


def _unpack(data: bytes, label: str) -> tuple[int, int, int, int, list[np.ndarray]]:
    """Version, count, degree, fractional bits and the six planes: sizes are known before memory is taken."""
    unzip = zlib.decompressobj(31)  # 31: gzip
    try:
        head = unzip.decompress(data, HEADER.size)
        if len(head) < HEADER.size:
            raise InputError(f"{label} is not an SPZ file: it ends within its header")
        magic, version, count, degree, bits, _, _ = HEADER.unpack(head)
        _check_header(magic, version, count, degree, bits, label)
        K = spherical.bases(degree)
        sizes = [9 * count, count, 3 * count, 3 * count, (4 if version == 3 else 3) * count, 3 * (K - 1) * count]
        if sum(sizes) > MAX_RATIO * len(data):
            raise InputError(f"{label} is truncated: its header announces {count} Gaussians")
        body = unzip.decompress(unzip.unconsumed_tail, sum(sizes))
    except zlib.error as error:
        raise InputError(f"{label} is not an SPZ file: {str(error)[:100]}") from error
    if len(body) < sum(sizes):
        raise InputError(f"{label} is truncated: {len(body)} of {sum(sizes)} bytes of {count} Gaussians")
    planes = np.split(np.frombuffer(body, np.uint8, sum(sizes)), np.cumsum(sizes)[:-1])
    return version, count, degree, bits, planes


def _check_header(magic: int, version: int, count: int, degree: int, bits: int, label: str) -> None:
    if magic != MAGIC:
        raise InputError(f"{label} is not an SPZ file: its first word is {magic:#x}")
    if version not in (2, 3):
        raise InputError(f"{label} is SPZ version {version}; versions 2 and 3 are read")
    if not 0 < count <= MAX_GAUSSIANS:
        raise InputError(f"{label} has {count} Gaussians; expected 1 to {MAX_GAUSSIANS}")
    if degree > 3 or bits > 24:
        raise InputError(f"{label}: degree {degree} with {bits} fractional bits is no SPZ")


def _positions(parts: np.ndarray) -> np.ndarray:  # uint8 [N, 3, 3] little-endian -> float64 [N, 3]
    words = np.zeros((*parts.shape[:2], 4), np.uint8)
    words[..., 1:] = parts  # as the high bytes, so that the sign comes along
    return (words.view("<i4")[..., 0] >> 8).astype(float)


def _pack_smallest_three(quats: np.ndarray) -> np.ndarray:  # [N, 4] wxyz, unit -> uint32 [N]
    """Index of the largest of x y z w in 2 bits, then the others: sign and 9 bits of magnitude each."""
    q = quats[:, [1, 2, 3, 0]]
    largest = np.abs(q).argmax(1)
    q = q * np.where(np.take_along_axis(q, largest[:, None], 1) < 0, -1, 1)
    others = np.take_along_axis(q, _others(largest), 1)
    magnitude = np.round(np.abs(others) * np.sqrt(2) * 511).clip(0, 511).astype(np.uint32)
    parts = (others < 0).astype(np.uint32) << 9 | magnitude
    return (largest.astype(np.uint32) << 30 | parts[:, 0] << 20 | parts[:, 1] << 10 | parts[:, 2]).astype("<u4")


def _unpack_smallest_three(packed: np.ndarray) -> np.ndarray:  # uint32 [N] -> [N, 4] wxyz
    largest = (packed >> 30).astype(np.int64)
    parts = packed[:, None] >> np.array([20, 10, 0], np.uint32) & 1023
    others = np.where(parts >> 9, -1, 1) * (parts & 511) / (511 * np.sqrt(2))
    q = np.empty((len(packed), 4))
    np.put_along_axis(q, _others(largest), others, 1)
    np.put_along_axis(q, largest[:, None], np.sqrt(np.maximum(1 - (others**2).sum(1, keepdims=True), 0)), 1)
    return q[:, [3, 0, 1, 2]]


def _unpack_first_three(parts: np.ndarray) -> np.ndarray:  # uint8 [N, 3] -> [N, 4] wxyz, as version 2 has it
    xyz = parts / 127.5 - 1
    return np.concatenate([np.sqrt(np.maximum(1 - (xyz**2).sum(1, keepdims=True), 0)), xyz], 1)


def _others(largest: np.ndarray) -> np.ndarray:  # [N] in 0..3 -> [N, 3], the other indices in order
    return np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[largest]


def _u8(numbers: np.ndarray) -> np.ndarray:
    return np.round(numbers).clip(0, 255).astype(np.uint8)
