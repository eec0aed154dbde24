""".splat, the 32-byte rows of the first web viewers: float position and scale, 8-bit colour and rotation.

Degree 0 only: what the colour looks like from the front stays, view dependence goes.  Errors by design:
colour and opacity 1/510 within 0..1, each component of the quaternion 1/128.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d2 import fileio
from d2.errors import InputError
from d2.recon.formats import values
from d2.recon.formats.frames import Frame, from_frame, to_frame
from d2.recon.formats.values import Values
from d2.recon.gaussians import MAX_GAUSSIANS, Gaussians3D
from d2.recon.raster import sh as spherical

ROW = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)])
BYTES_PER_GAUSSIAN = ROW.itemsize


def write(gaussians: Gaussians3D, path: str | Path, frame: Frame = "rdf") -> None:
    """Writes one moment, whole or not at all; the errors are those of `encode`."""
    fileio.atomic_write(path, encode(gaussians, frame))


def encode(gaussians: Gaussians3D, frame: Frame = "rdf") -> bytes:
    """The bytes of a .splat file, from Gaussians in our world, the most visible first.

    Viewers draw while they load, hence the order.  Raises InputError when there is nothing to write and
    NumericalError when a value is NaN or infinite.
    """
    v = values.of(to_frame(gaussians, frame))
    rows = np.empty(len(v.means), ROW)
    rows["mean"], rows["scale"] = v.means, v.scales
    rgb = 0.5 + spherical.C0 * v.sh[:, 0]
    rows["rgba"] = np.round(255 * np.column_stack([rgb, v.opacities]).clip(0, 1))
    rows["quat"] = np.round(128 * v.quats + 128).clip(0, 255)
    visibility = np.log(v.scales).sum(1) + np.log(np.maximum(v.opacities, 1e-30))
    return rows[np.argsort(-visibility, kind="stable")].tobytes()


def read(path: str | Path, frame: Frame = "rdf", warn: values.Warn | None = None) -> Gaussians3D:
    """Gaussians of degree 0 in our world; rows with NaN or infinity are dropped, and `warn` hears how many.

    The format has no header: InputError is raised when the size is no whole number of rows.
    """
    data, label = values.read_bytes(path, MAX_GAUSSIANS * ROW.itemsize)
    if not data or len(data) % ROW.itemsize:
        raise InputError(f"{label} is not a .splat file: {len(data)} bytes are no whole number of {ROW.itemsize}")
    rows = np.frombuffer(data, ROW)
    rgba = rows["rgba"] / 255.0
    with np.errstate(invalid="ignore"):  # a signalling NaN, which is dropped like every other
        means, scales = rows["mean"].astype(float), rows["scale"].astype(float)
    found = Values(
        means=means,
        quats=(rows["quat"].astype(float) - 128) / 128,
        scales=scales,
        opacities=rgba[:, 3],
        sh=((rgba[:, :3] - 0.5) / spherical.C0)[:, None],
    )
    checked = values.gaussians(found, label, warn) if warn else values.gaussians(found, label)
    return from_frame(checked, frame)
