"""The toybox: 4D scenes whose every view and moment is known, for training and benchmarks."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from d2 import camera
from d2.camera import DEFAULT_FOV_DEG, DEFAULT_RADIUS, Rig
from d2.errors import InputError
from d2.run import Run
from d2.toyrender import CAPSULE, ELLIPSOID, Parts, draw
from d2.toys import Split as Split
from d2.toys import Toy as Toy
from d2.toys import assemble, pose
from d2.toys import sample_toy as sample_toy

FILL_ELEVATION_DEG = 10.0


def render(
    toy: Toy,
    phases: np.ndarray | float,  # [N], the motion repeats with period 1
    azimuths: np.ndarray | float,  # [N] rad, from -y towards +x
    elevations: np.ndarray | float,  # [N] rad
    size: int,  # pixels
    radius: float = DEFAULT_RADIUS,
    fov_deg: float = DEFAULT_FOV_DEG,
    samples: int = 2,  # rays along each side of a pixel
) -> np.ndarray:  # [N, 4, size, size] float32
    """Pictures with colours on white and alpha, in 0..1, of every (phase, azimuth, elevation); a number stands for N.

    One thread, most of the time without the GIL.
    """
    phases, azimuths, elevations = np.broadcast_arrays(np.atleast_1d(phases), azimuths, elevations)
    parts, scale, height = _built(replace(toy, amplitude=1.0))  # which it does not depend on
    turns, origins = pose(toy, phases % 1)
    origins = origins * scale + [0, 0, height]
    viewmats = camera.viewmats(camera.look_at_origin(camera.orbit_positions(azimuths, elevations, radius)))
    focal = camera.focal_length(math.radians(fov_deg), size)
    return draw(parts, turns, origins, viewmats, focal, size, samples)


def matrix(toy: Toy, rig: Rig, frames: int, size: int | None = None) -> np.ndarray:  # [V, F, 4, H, W] float32
    """Every view of a square rig at every frame of one period; `size` replaces the rig's own width and height."""
    views = len(rig.azimuth)
    cells = np.tile(frame_phases(frames), views), np.repeat(np.arange(views), frames)
    pictures = _seen_by(rig, toy, *cells, size)
    return pictures.reshape(views, frames, *pictures.shape[1:])


def column(toy: Toy, phase: float, rig: Rig, size: int | None = None) -> np.ndarray:  # [V, 4, H, W] float32
    """Every view of a square rig at one phase."""
    return _seen_by(rig, toy, phase, np.arange(len(rig.azimuth)), size)


def row(toy: Toy, rig: Rig, view: int, frames: int, size: int | None = None) -> np.ndarray:  # [F, 4, H, W] float32
    """One view of a square rig at every frame of one period."""
    return _seen_by(rig, toy, frame_phases(frames), view, size)


def frame_phases(frames: int) -> np.ndarray:  # [F]
    """Phases of the frames of one period: frame f at f / F, so that the last leads back to the first."""
    return np.arange(frames) / frames


def straight_rgba(pictures: np.ndarray) -> np.ndarray:  # [..., 4, H, W] in 0..1 on white -> uint8 [..., H, W, 4]
    """8-bit pictures with straight alpha, as d2.images writes and reads them."""
    rgb, alpha = pictures[..., :3, :, :], pictures[..., 3:, :, :]
    straight = (rgb - (1 - alpha)) / np.maximum(alpha, 1e-6)
    rgba = np.concatenate([np.where(alpha > 0, straight, 0), alpha], -3)
    return np.moveaxis((np.clip(rgba, 0, 1) * 255).round().astype(np.uint8), -3, -1)


def write_dataset(
    toy: Toy,
    folder: str | Path,
    views: int,
    frames: int,
    size: int,
    fps: float = 12.0,
    elevation_deg: float = FILL_ELEVATION_DEG,
) -> Run:
    """A run folder with a finished matrix of the toy, as `d2 reconstruct` takes it; raises ConflictError."""
    rig = camera.orbit(views, elevation_deg, width=size, height=size)
    drawn: list[np.ndarray] = []  # the row of the current view

    def cell(v: int, f: int) -> np.ndarray:
        if f == 0:
            drawn[:] = straight_rgba(row(toy, rig, v, frames))
        return drawn[f]

    run = Run.create(folder, fps)
    run.write_matrix(cell, frames, rig, {"source": "toybox", "toy": asdict(toy)})
    return run


def _seen_by(
    rig: Rig,
    toy: Toy,
    phases: np.ndarray | float,  # [N] or one
    views: np.ndarray | int,  # [N] or one
    size: int | None,
) -> np.ndarray:  # [N, 4, H, W]
    """Raises InputError for a rig that is not square: pictures of toys are."""
    if rig.width != rig.height:
        raise InputError(f"toys are drawn in squares, not {rig.width}×{rig.height}; take a rig as wide as high")
    angles = rig.azimuth[views], rig.elevation[views]
    return render(toy, phases, *angles, size or rig.width, rig.radius, math.degrees(rig.fov))


@functools.lru_cache(maxsize=256)
def _built(toy: Toy) -> tuple[Parts, float, float]:
    """The toy's parts in world units, and the scale and height that make it fill the picture at phase 0."""
    parts = assemble(toy)
    turns, origins = pose(toy, np.zeros(1))
    scale, height = _fitted(parts, turns[0], origins[0], toy.fill)
    return parts._replace(centres=parts.centres * scale, halves=parts.halves * scale), scale, height


def _fitted(
    parts: Parts,
    turns: np.ndarray,  # [BONES, 3, 3]
    origins: np.ndarray,  # [BONES, 3]
    fill: float,
) -> tuple[float, float]:
    """Scale and height at which the front view is centred and `fill` of the picture high, by fixed-point steps."""
    elevation, tangent = math.radians(FILL_ELEVATION_DEG), math.tan(math.radians(DEFAULT_FOV_DEG) / 2)
    up = np.array([0, math.sin(elevation), math.cos(elevation)])
    back = np.array([0, -math.cos(elevation), math.sin(elevation)])
    centres = origins[parts.bones] + np.einsum("pij,pj->pi", turns[parts.bones], parts.centres)
    along = np.abs(np.einsum("pij,i->pj", turns[parts.bones], up)) * parts.halves
    reach = np.where(parts.kinds == ELLIPSOID, np.linalg.norm(along, axis=1), along.sum(1))
    reach = np.where(parts.kinds == CAPSULE, along[:, 2] + parts.halves[:, 0], reach)
    scale, height = 1.0, 0.0
    for _ in range(6):
        placed = centres * scale + [0, 0, height]
        half_picture = tangent * (DEFAULT_RADIUS - placed @ back)
        top = ((placed @ up + scale * reach) / half_picture).max()
        bottom = ((placed @ up - scale * reach) / half_picture).min()
        height -= 0.5 * (top + bottom) * DEFAULT_RADIUS * tangent / up[2]
        scale *= 2 * fill / (top - bottom)
    return scale, height
