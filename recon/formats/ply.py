"""The 3D Gaussian Splatting PLY: one file for a moment, a numbered sequence for a clip.

Layout of Kerbl et al. (SIGGRAPH 2023) as tools read it: binary little-endian, every property `float`,
colour as spherical harmonics channel by channel, opacity as a logit, scales as logarithms, rotation w x y z.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from d2 import __version__, fileio
from d2.errors import InputError, NumericalError
from d2.recon.formats import sequence
from d2.recon.formats.frames import FROM_WORLD, Frame, from_frame, to_frame
from d2.recon.formats.values import MAX_SCALE, MIN_SCALE
from d2.recon.gaussians import MAX_GAUSSIANS, OPACITY_LOGIT_LIMIT, Gaussians3D, Gaussians4D
from d2.recon.raster import sh as spherical

HEADER_CAP = 64 << 10  # bytes
_REST = {0: 0, 9: 1, 24: 2, 45: 3}  # f_rest properties -> degree
_SIZES = {
    "char": 1, "int8": 1, "uchar": 1, "uint8": 1, "short": 2, "int16": 2, "ushort": 2, "uint16": 2,
    "int": 4, "int32": 4, "uint": 4, "uint32": 4, "float": 4, "float32": 4, "double": 8, "float64": 8,
}  # fmt: skip
_FORMATS = ("ascii", "binary_little_endian", "binary_big_endian")
_FIXED = [
    "x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
    "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How files are written. Raises InputError for a value out of range."""

    frame: Frame = "rdf"
    pad_sh3: bool = False  # zeros up to degree 3 (45 f_rest), which Houdini and Adobe ask for
    prune_opacity: float = 0.0  # leaves out what is less opaque, so that N differs from file to file

    def __post_init__(self) -> None:
        if self.frame not in FROM_WORLD:
            raise InputError(f"frame must be one of {', '.join(FROM_WORLD)}, got {self.frame!r}")
        if not 0 <= self.prune_opacity < 1:
            raise InputError(f"prune_opacity must be at least 0 and below 1, got {self.prune_opacity!r}")

    def bytes_per_gaussian(self, degree: int) -> int:
        """What one Gaussian takes in a file: 68 at degree 0, 248 at degree 3."""
        return 4 * len(_property_names(3 if self.pad_sh3 else degree))


_DEFAULT = Layout()


# -- writing ---------------------------------------------------------------------------------------------


def write(gaussians: Gaussians3D, path: str | Path, layout: Layout = _DEFAULT, comments: Sequence[str] = ()) -> None:
    """Writes one moment, whole or not at all; the errors are those of `encode`."""
    fileio.atomic_write(path, encode(gaussians, layout, comments))


def encode(gaussians: Gaussians3D, layout: Layout = _DEFAULT, comments: Sequence[str] = ()) -> bytes:
    """The bytes of a PLY file, from Gaussians in our world.

    Opacity logits are clamped to ±15, scales to 1e-12..1e12.  A Gaussian with a zero quaternion, which no
    renderer here draws, keeps its place and is made transparent.  Raises InputError when nothing is left to
    write and NumericalError when a value is NaN or infinite.
    """
    kept = _kept(gaussians, layout.prune_opacity)
    table = _table(to_frame(kept, layout.frame), layout.pad_sh3)
    names = _property_names(3 if layout.pad_sh3 else kept.sh_degree)
    bad = ~np.isfinite(table)
    if bad.any():
        columns = ", ".join(names[k] for k in np.flatnonzero(bad.any(0))[:3])
        count = int(bad.any(1).sum())
        raise NumericalError(f"{count} of {len(table)} Gaussians are NaN or infinite in {columns}")
    lines = ["ply", "format binary_little_endian 1.0"]
    remarks = [f"Written by d2 {__version__}", f"frame {layout.frame}", *comments]
    lines += [f"comment {_one_line(text)}" for text in remarks]
    lines += [f"element vertex {len(table)}", *(f"property float {name}" for name in names), "end_header"]
    return ("\n".join(lines) + "\n").encode("ascii") + table.tobytes()


def write_sequence(
    gaussians: Gaussians4D,
    folder: str | Path,
    name: str,
    times: Sequence[float] | np.ndarray,  # [F] in 0..1
    fps: float,
    layout: Layout = _DEFAULT,
    *,
    overwrite: bool = False,
    progress: sequence.Progress = lambda done, total: None,
) -> Path:
    """Writes `<name>_0001.ply` … and frames.json into `folder`, as `sequence.write` does, with its errors.

    Every file holds the same Gaussians in the same order unless the layout prunes.
    """

    def one(time: float) -> bytes:
        return encode(gaussians.at(time), layout, [f"time {time:.9g}"])

    return sequence.write(one, folder, name, ".ply", times, fps, overwrite=overwrite, progress=progress)


def _kept(gaussians: Gaussians3D, prune_opacity: float) -> Gaussians3D:
    keep = gaussians.opacities >= prune_opacity if prune_opacity > 0 else None
    if len(gaussians) == 0 or (keep is not None and not keep.any()):
        what = f"no Gaussian has an opacity of {prune_opacity} or more" if len(gaussians) else "there are no Gaussians"
        raise InputError(f"nothing to write: {what}")
    if keep is None:
        return gaussians
    g = gaussians
    return Gaussians3D(g.means[keep], g.quats[keep], g.scales[keep], g.opacities[keep], g.sh[keep])


def _table(gaussians: Gaussians3D, pad_sh3: bool) -> np.ndarray:  # [N, P] little-endian float32
    """The stored values, property by property; non-finite input stays so and is caught by the caller."""
    means, quats, scales, opacities, coefficients = (
        tensor.detach().cpu().double().numpy()
        for tensor in (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh)
    )
    if pad_sh3:
        coefficients = np.pad(coefficients, ((0, 0), (0, spherical.bases(3) - coefficients.shape[1]), (0, 0)))
    length = np.linalg.norm(quats, axis=1, keepdims=True)
    undrawn = length[:, 0] == 0
    quats = np.where(undrawn[:, None], [1.0, 0, 0, 0], quats / np.where(length == 0, 1, length))
    rest = coefficients[:, 1:].transpose(0, 2, 1).reshape(len(means), -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logits = np.clip(np.log(opacities) - np.log1p(-opacities), -OPACITY_LOGIT_LIMIT, OPACITY_LOGIT_LIMIT)
        logits[undrawn] = -OPACITY_LOGIT_LIMIT
        log_scales = np.log(np.clip(scales, MIN_SCALE, MAX_SCALE))
        normals = np.zeros_like(means)
        columns = [means, normals, coefficients[:, 0], rest, logits[:, None], log_scales, quats]
        return np.concatenate(columns, 1).astype("<f4")


def _property_names(degree: int) -> list[str]:
    return [*_FIXED[:3], "nx", "ny", "nz", *_FIXED[3:6], *_rest_names(degree), *_FIXED[6:]]


def _rest_names(degree: int) -> list[str]:
    return [f"f_rest_{k}" for k in range(3 * (spherical.bases(degree) - 1))]


def _one_line(text: str) -> str:
    return " ".join(text.encode("ascii", "replace").decode().split())


# -- reading ---------------------------------------------------------------------------------------------


class _Element(NamedTuple):
    name: str
    rows: int
    properties: dict[str, int]  # name -> bytes of a value


class _Header(NamedTuple):
    ascii: bool
    elements: list[_Element]
    comments: list[str]
    size: int  # bytes


def read(
    path: str | Path,
    frame: Frame | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Gaussians3D:
    """Gaussians in our world from a 3DGS PLY: binary or ASCII, any number types, extra properties ignored.

    `frame` is the file's; by default what its comment says, else "rdf".  A row that holds NaN or infinity or
    a zero quaternion is dropped, and `warn` is told how many were; scales are clamped as in `encode`.  Raises
    InputError for anything that is not such a file, before memory is taken for its content.
    """
    label = fileio.quoted(path)
    rows, comments = _read_vertices(path, label, _splat_names)
    good = np.isfinite(rows).all(1) & (rows[:, 10:14] != 0).any(1)
    why = "Gaussians hold NaN, infinity or a zero quaternion"
    if not good.any():
        raise InputError(f"{label}: all {len(rows)} {why}")
    if not good.all():
        warn(f"{label}: {int((~good).sum())} of {len(rows)} {why}; they are dropped")
    return from_frame(_activated(rows[good]), frame or _frame_of(comments))


def read_points(path: str | Path) -> np.ndarray:  # [N, 3] float32
    """The finite vertices of a PLY file of points, as they stand in it; anything else it says of them is ignored.

    Raises InputError for anything that is not such a file, before memory is taken for its content.
    """
    label = fileio.quoted(path)
    rows, _ = _read_vertices(path, label, lambda vertex, label: _require(["x", "y", "z"], vertex, label, "points"))
    finite = rows[np.isfinite(rows).all(1)]
    if not len(finite):
        raise InputError(f"{label}: all {len(rows)} points hold NaN or infinity")
    return finite


def _read_vertices(
    path: str | Path, label: str, choose: Callable[[_Element, str], list[str]]
) -> tuple[np.ndarray, list[str]]:
    """Rows [N, P] of the vertices' properties that `choose` names, and the file's comments."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{label} {'is not a regular file' if path.exists() else 'does not exist'}")
    try:
        with open(path, "rb") as file:
            header = _read_header(file, label)
            names = choose(_checked_vertex(header, path.stat().st_size, label), label)
            # plyfile maps a binary file; the text wrapper it puts around others must not close ours.
            stream = io.BytesIO(file.read()) if header.ascii else file
            return _read_rows(stream, names, label), header.comments
    except OSError as error:
        raise InputError(f"cannot read {label}: {(error.strerror or str(error)).lower()}") from error


def _read_header(file: BinaryIO, label: str) -> _Header:
    """Parses the header within its cap and leaves the file at its beginning."""
    head = file.read(HEADER_CAP)
    file.seek(0)
    newline = next((n for n in (b"\r\n", b"\n", b"\r") if head.startswith(b"ply" + n)), None)
    end = head.find(newline + b"end_header" + newline) if newline else -1
    if newline is None or end < 0:
        raise InputError(f"{label} is not a PLY file: no header within its first {HEADER_CAP >> 10} KiB")
    try:
        lines = [line.strip() for line in head[:end].decode("ascii").split(newline.decode())[1:]]
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: the PLY header is not ASCII") from error
    form, elements, comments = None, [], []
    for line in lines:
        words = line.split()
        match words:
            case [] | ["obj_info", *_]:
                continue
            case ["comment", *_]:
                comments.append(line.removeprefix("comment").strip())
            case ["format", kind, "1.0"] if kind in _FORMATS:
                form = kind
            case ["element", name, count] if count.isdigit() and len(count) < 16:
                elements.append(_Element(name, int(count), {}))
            case ["property", kind, name] if kind in _SIZES and elements and name not in elements[-1].properties:
                elements[-1].properties[name] = _SIZES[kind]
            case ["property", "list", *_]:
                raise InputError(
                    f"{label}: list properties are not read; expected points or Gaussians alone, without faces"
                )
            case _:
                raise InputError(f"{label}: cannot understand the PLY header line {line[:80]!r}")
    if form is None:
        raise InputError(f"{label}: the PLY header names no format")
    return _Header(form == "ascii", elements, comments, end + len(newline) * 2 + len(b"end_header"))


def _checked_vertex(header: _Header, file_size: int, label: str) -> _Element:
    """The vertex element of a header whose counts fit the file."""
    vertex = next((element for element in header.elements if element.name == "vertex"), None)
    if vertex is None or not 0 < vertex.rows <= MAX_GAUSSIANS:
        count = "no" if vertex is None else vertex.rows
        raise InputError(f"{label} has {count} vertices; expected 1 to {MAX_GAUSSIANS}")
    needed = sum(_least_bytes(element, header.ascii) for element in header.elements)
    present = file_size - header.size
    if needed > present + header.ascii:  # the last newline of a text may be missing
        raise InputError(f"{label} is truncated: its header announces {needed} bytes of data, {present} follow")
    if any(element.rows == 0 or not element.properties for element in header.elements):
        raise InputError(f"{label}: an element of the PLY is empty")
    return vertex


def _splat_names(vertex: _Element, label: str) -> list[str]:
    """The properties of a splat: those of _FIXED, then f_rest."""
    _require(_FIXED, vertex, label, "3D Gaussians")
    rest = sum(name.startswith("f_rest_") for name in vertex.properties)
    if rest not in _REST or any(f"f_rest_{k}" not in vertex.properties for k in range(rest)):
        raise InputError(f"{label} has {rest} f_rest properties; expected f_rest_0 … of 0, 9, 24 or 45")
    return [*_FIXED, *_rest_names(_REST[rest])]


def _require(names: list[str], vertex: _Element, label: str, what: str) -> list[str]:
    missing = [name for name in names if name not in vertex.properties]
    if missing:
        raise InputError(f"{label} holds no {what}: {', '.join(missing[:3])} missing of {len(names)} properties")
    return names


def _least_bytes(element: _Element, text: bool) -> int:
    """What the rows of an element take at least: in a text a digit and a separator a value."""
    return element.rows * (2 * len(element.properties) if text else sum(element.properties.values()))


def _read_rows(stream: BinaryIO, names: list[str], label: str) -> np.ndarray:  # [N, P] float32
    """The vertex element's values in the order of `names`; the header has been checked."""
    from plyfile import PlyData, PlyParseError

    try:
        with np.errstate(over="ignore", invalid="ignore"):  # a value beyond float32 becomes infinite: dropped later
            vertex = PlyData.read(stream)["vertex"].data
            return np.stack([np.asarray(vertex[name], np.float32) for name in names], -1)
    except (PlyParseError, ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(f"{label} is not a readable PLY file: {str(error)[:200]}") from error


def _activated(rows: np.ndarray) -> Gaussians3D:
    """Gaussians in the file's frame from finite rows [N, 14 + f_rest] in the order of _FIXED, then f_rest."""
    values = torch.from_numpy(rows)
    rest = values[:, 14:].reshape(len(rows), 3, -1).transpose(1, 2)
    log_scales = values[:, 7:10].double().clamp(math.log(MIN_SCALE), math.log(MAX_SCALE))
    return Gaussians3D(
        means=values[:, 0:3].contiguous(),
        quats=torch.nn.functional.normalize(values[:, 10:14].double(), dim=-1, eps=1e-300).float(),
        scales=log_scales.exp().float(),
        opacities=values[:, 6].sigmoid(),
        sh=torch.cat([values[:, None, 3:6], rest], 1).contiguous(),
    )


def _frame_of(comments: list[str]) -> Frame:
    """What our own comment says; by custom a PLY is in RDF."""
    return next((name for name in FROM_WORLD if f"frame {name}" in comments), "rdf")  # type: ignore[return-value]
