"""Train on one split of a dataset and measure on the other: the numbers behind `d2 bench reconstruct`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2 import config as configuration
from d2 import images, machine
from d2.errors import InputError
from d2.recon import dataset, evaluation, evaluation_report, train
from d2.recon.config import ReconstructConfig
from d2.recon.gaussians import Gaussians4D
from d2.recon.metrics import by_elevation, psnr, psnr_foreground, ssim
from d2.recon.pipeline import Observer, kernel_threads
from d2.recon.raster import choose_backend

TRAIN_SAMPLE = 48  # training cells that psnr_train is averaged over


def reconstruct(
    path: str | Path,
    size: int = 128,
    seconds: float = 120.0,
    preset: str | Path = "quality",
    sets: tuple[str, ...] = (),
    device: str = "auto",
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Fits transforms_train.json for `seconds` and evaluates on transforms_test.json at `size` pixels.

    Images are area-filtered in premultiplied alpha and composited on white.  "psnr" is the mean of per-image PSNR
    over the test views; "seconds" is the training loop, with initialisation and compilation apart.
    """
    observer = observer or Observer()
    settings = configuration.load(ReconstructConfig, preset, sets=sets)
    place = machine.choose_device(device)
    if dataset.find_transforms(path, "train") == dataset.find_transforms(path, "test"):
        raise InputError(f"{path}: a benchmark needs transforms_train.json and transforms_test.json")
    observer.message("Reading images")
    data, test = dataset.load(path, "train", size), dataset.load(path, "test", size)
    test = test.on(data.background)
    with kernel_threads():
        observer.message("Compiling kernels (once on a machine) and carving the visual hull")
        compile_seconds = _timed(lambda: _warm_up(data, settings, place))
        begin = time.perf_counter()
        state = train.start(data, settings, place)
        init_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        model = train.fit(
            state, data.to(place), settings, lambda s, p: observer.progress(p, s.best_psnr), seconds=seconds
        )
        training_seconds = time.perf_counter() - begin
        observer.message("Measuring on the test views")
        result = measure(model, test.to(place), settings)
        sample = torch.linspace(0, len(data) - 1, min(TRAIN_SAMPLE, len(data))).round().long()
        seen = measure(model, data.subset(sample).to(place), settings)
        result |= {"psnr_train": seen["psnr"], "psnr_train_by_elevation": seen["psnr_by_elevation"]}
        if out is not None:
            model.save(Path(out) / "gaussians.safetensors", {"frames": str(data.frames)})
            images.write_png(Path(out) / "worst.png", worst_sheet(model, test.to(place), settings))
    return result | {
        "seconds": round(training_seconds, 2),
        "init_seconds": round(init_seconds, 2),
        "compile_seconds": round(max(0.0, compile_seconds - init_seconds), 2),
        "iterations": state.iteration,
        "gaussians": len(model),
        "ms_per_iteration": {k: round(1e3 * v / state.iteration, 3) for k, v in state.seconds.items()},
        "size": size,
        "train_images": len(data),
        "test_images": len(test),
        "backend": choose_backend(place).name,
        "config": configuration.resolved(settings),
        "machine": machine.describe(),
    }


@torch.no_grad()
def measure(model: Gaussians4D, cells: dataset.Dataset, settings: ReconstructConfig) -> dict[str, Any]:
    """psnr, psnr_foreground, ssim (means over images), psnr_worst and psnr_by_elevation of a model on a dataset."""
    return measure_pictures(lambda k: train.draw_cell(model, cells, k, settings.antialiased), cells)


@torch.no_grad()
def measure_pictures(draw: Callable[[int], Tensor], cells: dataset.Dataset) -> dict[str, Any]:
    """`measure` for anything that draws cell k [H, W, 3] on the dataset's background."""
    whole, inside, similarity = [], [], []
    for k in range(len(cells)):
        picture = draw(k)
        truth, alpha = evaluation.pair_truth(cells, k)
        whole.append(psnr(picture, truth))
        similarity.append(float(ssim(picture.clamp(0, 1), truth)))
        foreground = psnr_foreground(picture, truth, alpha)
        if not math.isnan(foreground):
            inside.append(foreground)
    return {
        "psnr": round(statistics.fmean(whole), 3),
        "ssim": round(statistics.fmean(similarity), 4),
        "psnr_foreground": round(statistics.fmean(inside), 3) if inside else None,
        "psnr_worst": round(min(whole), 3),
        "psnr_by_elevation": by_elevation(whole, evaluation.camera_elevations(cells)),
    }


@torch.no_grad()
def worst_sheet(model: Gaussians4D, cells: dataset.Dataset, settings: ReconstructConfig) -> np.ndarray:
    """uint8 picture: the worst test views, truth above, render in the middle, difference ×4 below."""
    angles = evaluation.camera_elevations(cells)
    renders = (train.draw_cell(model, cells, k, settings.antialiased) for k in range(len(cells)))
    return evaluation_report.worst_sheet(
        evaluation.picture_of(render, cells, k, float(angles[k])) for k, render in enumerate(renders)
    )


def _warm_up(data: dataset.Dataset, settings: ReconstructConfig, place: torch.device) -> None:
    state = train.start(data, settings, place)
    train.step(state, data.to(place), settings, 0.0)


def _timed(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
