"""Gaussians as the plain arrays a file holds: finite, normalised and in range on both sides of the border."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from d2 import fileio
from d2.errors import InputError, NumericalError
from d2.recon.gaussians import Gaussians3D

MIN_SCALE, MAX_SCALE = 1e-12, 1e12  # world; their squares stay normal float32 numbers in every viewer
FILE_CAP = 16 << 30  # bytes of a splat file that is read

Warn = Callable[[str], None]


class Values(NamedTuple):
    """Activated values in the axes of a file, float64."""

    means: np.ndarray  # [N, 3]
    quats: np.ndarray  # [N, 4] wxyz, unit
    scales: np.ndarray  # [N, 3] in MIN_SCALE..MAX_SCALE
    opacities: np.ndarray  # [N] in 0..1
    sh: np.ndarray  # [N, K, 3]


def of(gaussians: Gaussians3D) -> Values:
    """What a writer stores; a Gaussian with a zero quaternion, which nothing draws, is made transparent.

    Raises InputError when there is nothing to write and NumericalError when a value is NaN or infinite.
    """
    if len(gaussians) == 0:
        raise InputError("nothing to write: there are no Gaussians")
    g = gaussians
    means, quats, scales, opacities, sh = (
        tensor.detach().cpu().double().numpy() for tensor in (g.means, g.quats, g.scales, g.opacities, g.sh)
    )
    scales = np.where(scales == np.inf, MAX_SCALE, scales)
    bad = _bad_rows(means, quats, scales, opacities, sh)
    if bad.any():
        raise NumericalError(f"{int(bad.sum())} of {len(means)} Gaussians are NaN or infinite")
    length = np.linalg.norm(quats, axis=1, keepdims=True)
    undrawn = length[:, 0] == 0
    unit = np.where(undrawn[:, None], [1.0, 0, 0, 0], quats / np.where(length == 0, 1, length))
    visible = np.where(undrawn, 0, np.clip(opacities, 0, 1))
    return Values(means, unit, np.clip(scales, MIN_SCALE, MAX_SCALE), visible, sh)


def gaussians(values: Values, label: str, warn: Warn = warnings.warn) -> Gaussians3D:
    """What a reader returns, still in the file's axes.

    Rows that hold NaN, infinity or a zero quaternion are dropped, and `warn` is told how many; InputError
    when none is left, or where the arrays are not what Values says.
    """
    n, K = len(values.means), values.sh.shape[1] if values.sh.ndim == 3 else 0
    expected = Values((n, 3), (n, 4), (n, 3), (n,), (n, K if K in (1, 4, 9, 16) else 1, 3))
    for name, array, shape in zip(Values._fields, values, expected, strict=True):
        if array.shape != shape:
            raise InputError(f"{label}: {name} have the shape {list(array.shape)}; expected {list(shape)}")
    bad = _bad_rows(*values) | ~(values.quats != 0).any(1)
    why = "Gaussians hold NaN, infinity or a zero quaternion"
    if bad.all():
        raise InputError(f"{label}: all {len(bad)} {why}")
    if bad.any():
        warn(f"{label}: {int(bad.sum())} of {len(bad)} {why}; they are dropped")
        values = Values(*(array[~bad] for array in values))
    means, quats, scales, opacities, sh = (torch.from_numpy(np.asarray(array, np.float64)) for array in values)
    return Gaussians3D(
        means=means.float(),
        quats=torch.nn.functional.normalize(quats, dim=-1, eps=1e-300).float(),
        scales=scales.clamp(MIN_SCALE, MAX_SCALE).float(),
        opacities=opacities.clamp(0, 1).float(),
        sh=sh.float().contiguous(),
    )


def linear(rgb: np.ndarray) -> np.ndarray:
    """What glTF and USD mean by a colour, from a display-referred one (sRGB) in 0..1; beyond it is cut off."""
    rgb = np.clip(rgb, 0, 1)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def read_bytes(path: str | Path, cap: int = FILE_CAP) -> tuple[bytes, str]:
    """The content of a splat file and its name for messages. Raises InputError."""
    return fileio.read_bytes(path, cap), fileio.quoted(path)


def _bad_rows(*arrays: np.ndarray) -> np.ndarray:  # [N, …] each -> bool [N]
    bad = np.zeros(len(arrays[0]), bool)
    with np.errstate(over="ignore", invalid="ignore"):
        for array in arrays:
            rows = np.asarray(array, np.float32).reshape(len(array), -1)
            bad |= ~np.isfinite(rows).all(1)
    return bad
