""".4dgs, an open container for moving Gaussians, through the package that defines it (extra `fourdgs`).

Its gaussian-birth record is our form one to one: a mean at a time, a velocity, a standard deviation in time.
Times are seconds there: frame k of a clip is at k / fps.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from d2 import __version__, fileio, machine
from d2.recon.formats import values
from d2.recon.formats.frames import FROM_WORLD, Frame, move
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import sh as spherical

CUTOFF = 1 / 255  # fainter moments are not drawn: the rasterizer's threshold


def write(
    gaussians: Gaussians4D,
    path: str | Path,
    frames: int,  # of the clip: its last one is our time 1
    fps: float,
    frame: Frame = "rub",
) -> None:
    """Writes the clip, whole or not at all.

    Raises SetupError without the package, InputError for an empty set, NumericalError for NaN or infinity.
    """
    package = machine.require("fourdgs")
    buffer = io.BytesIO()
    axes = {"rub": "y-up-right-handed", "world": "z-up-right-handed", "rdf": "y-down-right-handed"}[frame]
    options = package.WriteOptions(
        cutoff=CUTOFF,
        library=f"d2 {__version__}",
        metadata={"coordinate_system": axes, "color_space": "srgb_rec709_display"},
    )
    found = _set(package, move(gaussians, FROM_WORLD[frame]), max(frames - 1, 1) / fps)
    package.write(buffer, found, frames / fps, options=options)
    fileio.atomic_write(path, buffer.getvalue())


def _set(package: Any, gaussians: Gaussians4D, seconds: float) -> Any:
    """Their GaussianSet; `seconds` is how long our time 0..1 lasts."""
    v = values.of(gaussians.at(0.0))
    g = gaussians.map(lambda tensor: tensor.detach().cpu().double())
    drawn = (g.quats != 0).any(1).numpy()
    rgb = 0.5 + spherical.C0 * v.sh[:, 0]
    rgba = np.column_stack([rgb.clip(0, 1), g.opacity_logits.sigmoid().numpy() * drawn])
    degree = spherical.degree_of(v.sh.shape[1])
    count = len(v.means)
    return package.GaussianSet(
        positions=_f4(g.means.numpy()),
        scales=_f4(v.scales),
        rotations=_f4(v.quats[:, [1, 2, 3, 0]]),
        colors=_f4(rgba),
        motions=_f4(g.velocities.numpy() / seconds),
        mu_t=_f4(g.times.numpy() * seconds),
        sigma_t=_f4(g.log_durations.exp().numpy() * seconds),
        win_lo=np.zeros(count, np.float32),
        win_hi=np.full(count, np.inf, np.float32),
        sh=_quantised(package, v.sh[:, 1:]) if degree else None,
        sh_degree=degree,
    )


def _quantised(package: Any, rest: np.ndarray) -> np.ndarray:  # [N, K - 1, 3] -> uint8 [N, 3 (K - 1)]
    """Channel by channel, over the range that the package declares."""
    low, high = package.gltf.SH_QUANT_LO, package.gltf.SH_QUANT_HI
    steps = np.round((rest - low) / (high - low) * 255).clip(0, 255)
    return steps.transpose(0, 2, 1).reshape(len(rest), -1).astype(np.uint8)


def _f4(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
