"""Datasets for nerfstudio: the pictures of one moment of a run, for its static methods, or views that a model draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from d2 import fileio, images
from d2.recon import dataset, drawing
from d2.recon.dataset import Shot
from d2.recon.gaussians import Gaussians4D
from d2.run import TRANSFORMS, Run

RINGS_DEG = (-10.0, 10.0, 30.0)  # elevations of drawn views of one moment
VIEWS = 16  # drawn in a ring
SIZE = 256  # pixels of a drawn view


def write_moment_of(run: Run, time: float, folder: Path) -> None:
    """The pictures of a finished run at its moment nearest to `time` (0..1), with their cameras, into `folder`."""
    shots = dataset.shots(run.folder)
    nearest = min((shot.time for shot in shots), key=lambda t: abs(t - time))
    chosen = [shot for shot in shots if shot.time == nearest]
    _write(folder, chosen, (fileio.read_bytes(shot.image, images.MAX_FILE) for shot in chosen), moving=False)


def write_drawn_moment(gaussians: Gaussians4D, time: float, folder: Path) -> None:
    """Rings of views that the model itself gives at `time` (0..1), with their cameras, into `folder`."""
    elevations = np.repeat(np.radians(RINGS_DEG), VIEWS)
    _draw(gaussians, elevations, np.full(len(elevations), time), folder, moving=False)


def write_drawn_clip(gaussians: Gaussians4D, folder: Path) -> None:
    """One turn around the model while time runs from 0 to 1, with its cameras, into `folder`."""
    _draw(gaussians, np.full(VIEWS, drawing.DEFAULT_ELEVATION), np.linspace(0, 1, VIEWS), folder, moving=True)


def _draw(gaussians: Gaussians4D, elevations: np.ndarray, times: np.ndarray, folder: Path, moving: bool) -> None:
    center, radius = drawing.framing(gaussians)
    rig = drawing.orbit_rig(radius, 2 * np.pi * np.arange(len(times)) / VIEWS, SIZE, SIZE)
    c2w = replace(rig, elevation=elevations).c2w
    c2w[:, :3, 3] += center
    shots = [Shot(Path(f"{k}.png"), None, c2w[k], rig.K, SIZE, SIZE, float(times[k])) for k in range(len(times))]
    pictures = drawing.render_views(gaussians, c2w, rig.K, SIZE, SIZE, times)
    _write(folder, shots, (images.png_bytes(images.to_uint8(picture)) for picture in pictures), moving)


def _write(folder: Path, shots: list[Shot], pictures: Iterable[bytes], moving: bool) -> None:
    """images/000.png … and transforms.json, in nerfstudio's layout; `time` only where it is `moving`."""
    frames = []
    for k, (shot, picture) in enumerate(zip(shots, pictures, strict=True)):
        name = f"images/{k:03d}{shot.image.suffix}"
        fileio.atomic_write(folder / name, picture)
        frame = {
            "file_path": name,
            "transform_matrix": shot.c2w.tolist(),
            "w": shot.width, "h": shot.height,
            "fl_x": shot.K[0, 0], "fl_y": shot.K[1, 1], "cx": shot.K[0, 2], "cy": shot.K[1, 2],
        }  # fmt: skip
        frames.append(frame | ({"time": shot.time} if moving else {}))
    meta = {"camera_model": "OPENCV", "orientation_override": "none", "frames": frames}
    fileio.write_json(folder / TRANSFORMS, meta)
