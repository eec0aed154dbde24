"""Columns and rows of pictures to train on: of toys, drawn as they are needed, or of a folder of finished runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from d2 import fileio, toybox
from d2.errors import InputError
from d2.models.conditioner import sv3d_angles, sv3d_vector, svd_vector
from d2.pair import Model, model_angles
from d2.run import TRANSFORMS, Run, is_run
from d2.settings import GenerateConfig

ELEVATION = math.radians(5.0)  # toys are seen from this much above or below the configured elevation
CYCLE = 1.0  # seconds that a toy's motion takes
RATES = (0.75, 1.0, 1.5)  # frames a second that toys are trained at, times the configured one
RATE_SHARES = (0.15, 0.7, 0.15)
USUAL_MOTION = 127.0  # the motion bucket of a toy whose amplitude is 1


class Batch(NamedTuple):
    """Sequences with what their models are told about them."""

    pictures: Tensor  # [B, T, 3, H, W] in -1..1, on white
    vector: Tensor  # [B, T, A]

    def reference(self, model: Model) -> Tensor:  # [B, 3, H, W]
        """The picture that each sequence is conditioned on: a column's last view, a row's first frame."""
        return self.pictures[:, -1 if model == "view" else 0]


class Sequences(Protocol):
    """Where training sequences come from; the same seed gives the same batch."""

    def batch(self, model: Model, seed: Sequence[int], size: int) -> Batch: ...


class Toys:
    """An endless stream of toys: no two batches of the training split are alike."""

    def __init__(self, settings: GenerateConfig, split: toybox.Split) -> None:
        self.settings = settings
        self.split: toybox.Split = split

    def batch(self, model: Model, seed: Sequence[int], size: int) -> Batch:
        """`size` columns or rows, each of a toy of its own."""
        rng = np.random.default_rng([*seed, 0 if model == "view" else 1])
        draw = self._column if model == "view" else self._row
        pictures, vectors = zip(*(draw(rng) for _ in range(size)), strict=True)
        rgb = torch.from_numpy(np.stack(pictures)[:, :, :3])
        return Batch(rgb * 2 - 1, torch.stack(vectors))

    def _column(self, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        c = self.settings
        elevation = math.radians(c.elevation_deg) + rng.uniform(-ELEVATION, ELEVATION)
        elevations, phases = np.full(c.views, elevation), np.full(c.views, rng.uniform())
        pictures = self._render(self._toy(rng), phases, c.rig.azimuth, elevations)
        return pictures, view_vector(c, elevations)

    def _row(self, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        c = self.settings
        elevation = math.radians(c.elevation_deg) + rng.uniform(-ELEVATION, ELEVATION)
        azimuth = rng.choice(c.rig.azimuth)
        rate = c.fps_id * rng.choice(RATES, p=RATE_SHARES)
        phases = np.arange(c.frames) / (rate * CYCLE)
        toy = self._toy(rng)
        pictures = self._render(toy, phases, np.full(c.frames, azimuth), np.full(c.frames, elevation))
        return pictures, svd_vector(rate, USUAL_MOTION * toy.amplitude, c.cond_aug_frame, c.frames, c.embedding)

    def _toy(self, rng: np.random.Generator) -> toybox.Toy:
        return toybox.sample_toy(self.split, int(rng.integers(2**31)))

    def _render(
        self,
        toy: toybox.Toy,
        phases: np.ndarray,  # [T]
        azimuths: np.ndarray,  # [T] rad
        elevations: np.ndarray,  # [T] rad
    ) -> np.ndarray:  # [T, 4, H, W]
        c = self.settings
        return toybox.render(toy, phases, azimuths, elevations, c.size, c.radius, c.fov_deg)


class Runs:
    """Rows and columns of finished run folders of the configured shape: a user's own renders."""

    def __init__(self, settings: GenerateConfig, folder: str | Path) -> None:
        self.settings = settings
        found = [path.parent for path in sorted(Path(folder).glob("**/run.json")) if is_run(path.parent)]
        if not found:
            raise InputError(f"{fileio.quoted(folder)} holds no run.json; expected a folder of finished runs")
        self.runs = [(Run.open(path).matrix(), elevations(path, settings.views)) for path in found]
        for path, (matrix, _) in zip(found, self.runs, strict=True):
            shape = matrix.views, matrix.frames, matrix.width, matrix.height
            wanted = settings.views, settings.frames, settings.size, settings.size
            if shape != wanted:
                raise InputError(f"{fileio.quoted(path)}: views, frames, width, height are {shape}, expected {wanted}")

    def batch(self, model: Model, seed: Sequence[int], size: int) -> Batch:
        """`size` columns or rows, each from a run and a place drawn at random."""
        c = self.settings
        rng = np.random.default_rng([*seed, 0 if model == "view" else 1])
        pictures, vectors = [], []
        for _ in range(size):
            matrix, elevation = self.runs[rng.integers(len(self.runs))]
            if model == "view":
                pictures.append(matrix.tensor(list(range(c.views)), [int(rng.integers(c.frames))])[:, 0])
                vectors.append(view_vector(c, elevation))
            else:
                pictures.append(matrix.tensor([int(rng.integers(c.views))], list(range(c.frames)))[0])
                vectors.append(svd_vector(c.fps_id, c.motion, c.cond_aug_frame, c.frames, c.embedding))
        return Batch(torch.stack(pictures) * 2 - 1, torch.stack(vectors))


def elevations(folder: Path, views: int) -> np.ndarray:  # [V] rad
    """How far above the horizon each camera of a run stands, by its transforms.json."""
    try:
        frames = fileio.read_json(folder / TRANSFORMS)["frames"]
        centres = {int(f["view"]): np.array(f["transform_matrix"], float)[:3, 3] for f in frames}
        return np.array([math.asin(centres[v][2] / np.linalg.norm(centres[v])) for v in range(views)])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{fileio.quoted(folder / TRANSFORMS)} has not a camera for each of {views} views") from error


def view_vector(
    settings: GenerateConfig,
    elevation: np.ndarray,  # [V] rad
) -> Tensor:  # [V, A]
    """A column's numbers, as Pair.view_vector gives them."""
    polar, azimuth = sv3d_angles(torch.from_numpy(elevation), model_angles(settings.views))
    return sv3d_vector(settings.cond_aug_view, polar, azimuth, settings.embedding)
