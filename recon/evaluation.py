"""How good reconstructions are against a dataset: the numbers, plots and sheet behind `d2 bench evaluate`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2 import fileio, images, machine
from d2.phases import Observer
from d2.recon import consistency, dataset, evaluation_report, fvd, geometry, hull, perceptual, sources, train
from d2.recon.dataset import Dataset
from d2.recon.evaluation_report import Picture
from d2.recon.gaussians import Gaussians4D
from d2.recon.metrics import by_elevation, elevations, ms_ssim, over_time, psnr, psnr_foreground, ssim
from d2.recon.pipeline import kernel_threads
from d2.recon.raster import choose_backend

CONSISTENCY_CELLS = 48  # cameras and moments that the cross-view measure looks from
FEATURE_SIZE = 32  # pixels of the shorter side from which every layer of LPIPS' networks has one


@dataclass(frozen=True)
class Weights:
    """Files of the networks that judge likeness; a measure without its file is left out, never replaced."""

    lpips: str | Path | None = None
    clip: str | Path | None = None
    i3d: str | Path | None = None


@dataclass(frozen=True)
class Judges:
    """Those networks, loaded."""

    lpips: perceptual.LPIPS | None
    clip: Any  # an OpenCLIP, or None
    i3d: fvd.I3D | None


@dataclass(frozen=True)
class Truth:
    """What the models are measured against."""

    split: str  # "test", or "all" where there is but one
    cells: Dataset  # pictures that every measure of single pictures is averaged over
    matrix: Dataset | None  # V·F pictures view by view, for measures over time
    grid: tuple[int, int]  # V, F
    matrix_split: str | None  # where the matrix is from
    points: list[Tensor]  # [n, 3] a moment


def evaluate(
    models: str | Path | Sequence[str | Path],
    truth: str | Path,
    *,
    size: int | None = None,
    device: str = "auto",
    points: str | Path | None = None,
    weights: Weights | None = None,
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Renders reconstructions from a dataset's cameras and compares them with its pictures.

    `models`: run folders (their newest reconstruction), reconstructions' folders or gaussians.safetensors; several
    are taken for seeds of one method, and "mean" and "std" (of the sample) are over them.  `truth`: a folder with
    transforms_test.json, else transforms.json; `size` area-filters its pictures to that longer side.  Measures over
    time take the test split where it is a full matrix of views × moments, else the training split ("over_time_on").
    Geometry is measured where `points`, or the dataset's `points/`, holds PLY files (`geometry.find_points`).  What
    cannot be measured is missing from the rows, and "absent" says why.  `out` receives results.json, plots.png and
    worst.png.  Raises InputError for what cannot be read, SetupError for weights of another layout.
    """
    observer = observer or Observer()
    paths = [models] if isinstance(models, str | Path) else list(models)
    place = machine.choose_device(device)
    found = [sources.find(path) for path in paths]
    observer.message(f"Reading {fileio.quoted(truth)}")
    judges = load_judges(weights or Weights())
    target = read_truth(truth, size, points)
    rows, pictures = [], []
    with kernel_threads():
        for number, (path, source) in enumerate(zip(paths, found, strict=True)):
            total = f" ({number + 1} of {len(paths)})" if len(paths) > 1 else ""
            job = _Job(source.gaussians, _is_antialiased(source.folder), target, judges, place, observer, total)
            scores, drawn = job.run()
            rows.append({"model": str(path), "gaussians": len(source.gaussians)} | scores)
            pictures.append(drawn)
    result = {
        "truth": Path(truth).resolve().name,
        "split": target.split,
        "size": [target.cells.width, target.cells.height],
        "pictures": len(target.cells),
        "models": rows,
        **_over_models(rows),
        "over_time_on": target.matrix_split,
        "absent": _absent(judges, target),
        "backend": choose_backend(place).name,
        "machine": machine.describe(),
    }
    if out is not None:
        evaluation_report.write(Path(out), result, pictures)
    return result


def read_truth(path: str | Path, size: int | None = None, points: str | Path | None = None) -> Truth:
    """The pictures and points to measure against. Raises InputError."""
    cells = matrix = dataset.load(path, "test", size)
    is_split = dataset.find_transforms(path, "test") != dataset.find_transforms(path, "train")
    split = matrix_split = "test" if is_split else "all"
    order = matrix_order(cells)
    if order is None and is_split:
        matrix, matrix_split = dataset.load(path, "train", size), "train"
        order = matrix_order(matrix)
    clouds = [geometry.read_points(file) for file in geometry.find_points(path, points)]
    if order is None:
        return Truth(split, cells, None, (0, 0), None, clouds)
    return Truth(split, cells, matrix.subset(order[0]), order[1], matrix_split, clouds)


def matrix_order(cells: Dataset) -> tuple[Tensor, tuple[int, int]] | None:
    """The order [V·F] that makes cells a matrix, view by view, and its shape; None where one is missing or double."""
    times, moment = cells.times.unique(return_inverse=True)
    V, F = int(cells.views.max()) + 1, len(times)
    place = cells.views * F + moment
    if F < 2 or len(cells) != V * F or len(place.unique()) != V * F:
        return None
    return place.argsort(), (V, F)


def load_judges(weights: Weights) -> Judges:
    """Raises InputError for a file that is not there, SetupError for one of another layout."""
    return Judges(
        weights.lpips and perceptual.load_lpips(weights.lpips),  # type: ignore[arg-type]
        weights.clip and perceptual.load_clip(weights.clip),
        weights.i3d and fvd.load_i3d(weights.i3d),  # type: ignore[arg-type]
    )


@dataclass
class _Job:
    """The measuring of one model."""

    model: Gaussians4D
    antialiased: bool
    truth: Truth
    judges: Judges
    device: torch.device
    observer: Observer
    label: str  # which of the models, for the progress

    def run(self) -> tuple[dict[str, Any], list[Picture]]:
        """All scores, and every picture's for the plots and the sheet."""
        self.model = self.model.map(lambda tensor: tensor.to(self.device))
        cells = self.truth.cells.to(self.device)
        angles = camera_elevations(cells)
        pictures, scores = self._pictures(cells, angles)
        scores["psnr_by_elevation"] = by_elevation([p.psnr for p in pictures], angles)
        self.observer.message(f"Comparing neighbouring views{self.label}")
        index = geometry.spread(len(cells), CONSISTENCY_CELLS)
        scores |= consistency.cross_view(self.model, cells, index, self.antialiased)
        if self.truth.matrix is not None:
            scores |= self._over_time()
        if self.truth.points:
            self.observer.message(f"Measuring geometry{self.label}")
            scores |= geometry.score(self.model, cells, self.truth.points, self.antialiased)
        return {key: value for key, value in scores.items() if value is not None}, pictures

    @torch.no_grad()
    def _pictures(self, cells: Dataset, angles: Tensor) -> tuple[list[Picture], dict[str, Any]]:
        rows: list[dict[str, float]] = []
        pictures = []
        for k in range(len(cells)):
            render = train.draw_cell(self.model, cells, k, self.antialiased).clamp(0, 1)
            truth, alpha = pair_truth(cells, k)
            rows.append(self._scores(render, truth, alpha if cells.has_alpha else None))
            pictures.append(picture_of(render, cells, k, float(angles[k])))
            self.observer.phase(f"pictures{self.label}", k + 1, len(cells))
        values = {key: [row[key] for row in rows if not math.isnan(row[key])] for key in rows[0]}
        means = {key: round(statistics.fmean(found), 4) if found else None for key, found in values.items()}
        return pictures, means | {"psnr_worst": round(min(values["psnr"]), 4)}

    def _scores(self, render: Tensor, truth: Tensor, alpha: Tensor | None) -> dict[str, float]:
        """Of one picture [H, W, 3]."""
        scores = {"psnr": psnr(render, truth)}
        if alpha is not None:
            scores["psnr_foreground"] = psnr_foreground(render, truth, alpha)
        scores |= {"ssim": float(ssim(render, truth)), "ms_ssim": ms_ssim(render, truth)}
        x, y = (p.cpu().permute(2, 0, 1)[None] for p in (render, truth))
        if self.judges.lpips is not None and min(x.shape[2:]) >= FEATURE_SIZE:
            scores["lpips"] = float(self.judges.lpips(x, y))
        if self.judges.clip is not None:
            scores["clip_i"] = float(perceptual.likeness(self.judges.clip, x, y))
        return scores

    @torch.no_grad()
    def _over_time(self) -> dict[str, float | None]:
        assert self.truth.matrix is not None
        small: list[tuple[Tensor, Tensor]] = []
        scores: dict[str, Any] = over_time(self._videos(small))
        if self.judges.i3d is not None:
            self.observer.message(f"Comparing videos{self.label}")
            sample, truth = (torch.stack([pair[side] for pair in small]) for side in (0, 1))
            scores |= fvd.fvd(self.judges.i3d, sample, truth)
        return {key: None if math.isnan(value) else round(value, 5) for key, value in scores.items()}

    def _videos(self, small: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each view's render [F, 3, H, W] and truth [F, 4, H, W]; `small` keeps them at I3D's size if it judges."""
        assert self.truth.matrix is not None
        V, F = self.truth.grid
        for v in range(V):
            row = self.truth.matrix.subset(torch.arange(v * F, (v + 1) * F)).to(self.device)
            renders = torch.stack([train.draw_cell(self.model, row, f, self.antialiased).cpu() for f in range(F)])
            truths = [
                torch.cat([truth, alpha[..., None]], -1) for truth, alpha in (pair_truth(row, f) for f in range(F))
            ]
            pair = renders.clamp(0, 1).permute(0, 3, 1, 2), torch.stack(truths).cpu().permute(0, 3, 1, 2)
            if self.judges.i3d is not None:
                small.append((fvd.resized(pair[0]), fvd.resized(pair[1][:, :3])))
            self.observer.phase(f"views over time{self.label}", v + 1, V)
            yield pair


def pair_truth(cells: Dataset, k: int) -> tuple[Tensor, Tensor]:
    """A cell's picture [H, W, 3] on the dataset's background, and its alpha [H, W]."""
    rgba = cells.images[k].float() / 255
    return rgba[..., :3] + (1 - rgba[..., 3:]) * cells.background, rgba[..., 3]


def picture_of(
    render: Tensor,  # [H, W, 3]
    cells: Dataset,
    k: int,
    elevation: float,  # rad
) -> Picture:
    """A render of cell k beside the truth."""
    truth, _ = pair_truth(cells, k)
    shown = [images.to_uint8(picture.clamp(0, 1).cpu().numpy()) for picture in (truth, render)]
    place = cells.names[k], float(cells.times[k]), int(cells.views[k]), math.degrees(elevation)
    return Picture(*place, psnr(render, truth), *shown)


def camera_elevations(cells: Dataset) -> Tensor:  # [n] rad
    """How far above the horizon each cell's camera stands, seen from what all cameras look at."""
    middle, _ = hull.scene_box(cells.to("cpu"))
    return elevations(cells.camera_centres().cpu(), torch.from_numpy(middle).float())


def _is_antialiased(folder: Path | None) -> bool:
    """How a reconstruction was trained to be drawn; the config.yaml beside it says."""
    file = None if folder is None else folder / "config.yaml"
    settings = fileio.read_yaml(file) if file is not None and file.is_file() else {}
    return isinstance(settings, dict) and settings.get("antialiased") is True


def _absent(judges: Judges, truth: Truth) -> dict[str, str]:
    """Why measures are missing."""
    absent: dict[str, str] = {}
    if not truth.cells.has_alpha:
        absent["psnr_foreground"] = "the truth has no masks"
    if truth.matrix is None:
        absent["flicker, motion"] = "the truth holds no full matrix of views × moments"
    if not truth.points:
        absent["chamfer, f_score"] = f"no true points: neither --points nor {geometry.FOLDER}/ in the dataset"
    side = min(truth.cells.width, truth.cells.height)
    if judges.lpips is None:
        absent["lpips"] = "no weights: give --lpips-weights FILE"
    elif side < FEATURE_SIZE:
        absent["lpips"] = f"pictures have {side} pixels; it needs {FEATURE_SIZE}"
    if judges.clip is None:
        absent["clip_i"] = "no weights: give --clip-weights FILE"
    if judges.i3d is None:
        absent["fvd"] = "no weights: give --i3d-weights FILE"
    elif truth.matrix is None or max(truth.grid) < fvd.LEAST:
        absent["fvd"] = f"no video of at least {fvd.LEAST} pictures in a matrix of views × moments"
    return absent


def _over_models(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of the sample; with two models or more) of every number that all models have."""
    shared = [k for k, v in rows[0].items() if isinstance(v, int | float) and all(k in row for row in rows)]
    mean = {key: round(statistics.fmean(row[key] for row in rows), 5) for key in shared}
    if len(rows) < 2:
        return {"mean": mean}
    return {"mean": mean, "std": {key: round(statistics.stdev(row[key] for row in rows), 5) for key in shared}}
