"""Does composing two models beat either of them?  Measured on toys, whose every view at every moment is known.

Every sample is an ordinary run of `d2 generate`; samples of one toy and mode share their references.  Only free
cells count: those that are neither in the input's row nor in the first column, which are conditioned on.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2 import config as configuration
from d2 import fileio, images, machine, toybox
from d2.generation import generate
from d2.matrix import ImageMatrix
from d2.noise import matrix_noise
from d2.pair import Model, Pair, load_models, model_angles
from d2.phases import REFERENCE_VIDEO, REFERENCE_VIEWS, Observer
from d2.preprocess import to_tensor
from d2.previews import alpha_from_white
from d2.recon import benchmark, dataset
from d2.recon.config import ReconstructConfig
from d2.recon.gaussians import Gaussians4D
from d2.recon.metrics import over_time, psnr, psnr_foreground, ssim
from d2.recon.pipeline import reconstruct
from d2.run import Run, is_run
from d2.settings import GenerateConfig

# What is given, from the truth: nothing but the first picture, the front video, the views of the first moment, both.
MODES = {"image": (False, False), "video": (True, False), "static": (False, True), "true": (True, True)}
# How the matrix is sampled from the references: fields of d2.sampler.SamplerConfig over the preset's.
VARIANTS: dict[str, tuple[str, ...]] = {
    "composed": (),
    "view only": ("composition=constant", "scale=1.0"),
    "frame only": ("svd_only_from=-1.0",),
    "one step": ("steps=1",),
    "exact vrs": ("vrs=exact", "vrs_steps=4"),
    "reference vrs": ("vrs=reference", "vrs_steps=4"),
    "scale 0.3": ("composition=constant", "scale=0.3"),
    "scale 0.8": ("composition=constant", "scale=0.8"),
    "linear": ("composition=linear",),
    "cosine": ("composition=cosine",),
    "logistic": ("composition=logistic", "scale=0.5"),
}
MAIN = "composed", "view only", "frame only"
ANCHOR = "anchor last"  # the views are sampled from the video's last frame, as the reference implementation does
PROBE_SIGMA = 1.0  # noise level at which samples are judged by the models
# Of the reconstruction whose residual tells how consistent a sample is; the same for samples and controls.
FIT_SETS = ("holdout=0", "iterations=1500", "min_scale=0", "haze_weight=0")
Z95 = 1.96
SHOWN = "psnr", "ssim", "flicker", "motion", "fit psnr", "error of the view model", "error of the frame model"


@dataclass(frozen=True)
class Task:
    """One toy's samples in one mode."""

    toy: int  # of the test split
    mode: str
    variants: tuple[str, ...]
    fit: bool  # whether 4D Gaussians are fitted to the main samples


def composition(
    toys: int = 32,
    few: int = 8,
    preset: str | Path = "tiny",
    weights: str | Path | None = None,
    sets: tuple[str, ...] = (),
    work: str | Path | None = None,
    processes: int = 1,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Samples and measures; the table as plain data.

    All `toys` are sampled by both models together and by each alone, from sampled and from true references; the
    first `few` in every mode and variant, with a 4D fit.  In `work` the runs and items.jsonl stay, and a repeated
    call goes on from there (without it, a temporary folder).  Raises what d2.generate raises.
    """
    observer = observer or Observer()
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            return composition(toys, few, preset, weights, sets, folder, processes, observer)
    settings = configuration.load(GenerateConfig, configuration.preset_path(preset, "generate"), sets=sets)
    key = configuration.digest(settings) + str(sorted(load_models(settings, weights).digests().values()))
    tasks = [task for task in _tasks(toys, few) if (task.toy, task.mode) not in _done(Path(work), key)]
    found = _run(tasks, settings, preset, weights, sets, Path(work), processes)
    for number, items in enumerate(found):
        observer.phase("toys", number + 1, len(tasks))
        for item in items:
            fileio.append_line(Path(work) / "items.jsonl", json.dumps(item | {"key": key}))
    items = [item for item in _items(Path(work), key) if item["toy"] < toys]
    return {"machine": machine.describe(), "toys": toys, "few": few, "steps": settings.steps, "rows": table(items)}


def table(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of every measure over toys, and of its difference to the composed sample's."""
    groups: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for item in items:
        groups.setdefault((item["mode"], item["variant"]), {})[item["toy"]] = item["scores"]
    rows = []
    for (mode, variant), scores in groups.items():
        row: dict[str, Any] = {"mode": mode, "variant": variant, "toys": len(scores)}
        composed = groups.get((mode, "composed"), {})
        for name in next(iter(scores.values())):
            values = {toy: s[name] for toy, s in scores.items() if name in s}
            row[name] = interval(list(values.values()))
            paired = [composed[toy][name] - v for toy, v in values.items() if name in composed.get(toy, {})]
            if variant != "composed" and paired:
                row[f"composed minus this: {name}"] = interval(paired)
        rows.append(row)
    return rows


def as_text(result: dict[str, Any]) -> str:
    """The table for people: mean ± half the 95 % interval."""
    lines = [f"{result['toys']} toys of the test split, {result['steps']} steps; {result['machine']}"]
    lines.append(f"{'mode':8}{'variant':20}{'toys':>5}" + "".join(f"{name:>20}" for name in SHOWN))
    for row in result["rows"]:
        cells = [f"{row[name][0]:.3f} ± {row[name][1]:.3f}" if name in row else "" for name in SHOWN]
        lines.append(f"{row['mode']:8}{row['variant']:20}{row['toys']:5}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def interval(values: list[float]) -> list[float]:
    """[mean, half width of its 95 % confidence interval], to four digits; the width is 0 for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [round(statistics.fmean(values), 4), round(Z95 * spread / math.sqrt(len(values)), 4)]


def _tasks(toys: int, few: int) -> list[Task]:
    """The most telling first."""
    everything = tuple(VARIANTS)
    tasks = [Task(toy, "image", everything if toy < few else MAIN, toy < few) for toy in range(toys)]
    tasks += [Task(toy, "true", (*MAIN, "one step") if toy < few else MAIN, False) for toy in range(toys)]
    return tasks + [Task(toy, mode, MAIN, False) for mode in ("video", "static") for toy in range(few)]


def _run(tasks, settings, preset, weights, sets, work, processes):
    """Every task's items, as they are done; one thread a process."""
    arguments = [(task, settings, preset, weights, sets, work) for task in tasks]
    if processes == 1:
        yield from (measure(*each) for each in arguments)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(measure, *each) for each in arguments]):
            yield future.result()


def measure(
    task: Task,
    settings: GenerateConfig,
    preset: str | Path,
    weights: str | Path | None,
    sets: tuple[str, ...],
    work: Path,
) -> list[dict[str, Any]]:
    """The scores of every sample of a task."""
    folder = work / f"toy{task.toy:03d}"
    truth = _truth(task.toy, settings, folder)
    samples = Samples(folder, task.mode, settings, preset, weights, sets)
    made = {variant: samples.sample(variant) for variant in task.variants}
    if task.mode == "video":
        made[ANCHOR] = samples.sample(ANCHOR)
    cells = {name: matrix.tensor(*_all(settings)) for name, matrix in made.items()}
    if "view only" in cells and "frame only" in cells:
        cells["average"] = (cells["view only"] + cells["frame only"]) / 2
    views = [images.read_rgba(path)[0] for path in samples.references(REFERENCE_VIEWS)]
    still = torch.stack([torch.from_numpy(view[..., :3].astype(np.float32) / 255).permute(2, 0, 1) for view in views])
    cells["static references"] = still[:, None].expand(-1, settings.frames, -1, -1, -1)
    judge = Judge(load_models(settings, weights), settings, samples)
    items = []
    for name, sample in cells.items():
        scores = scores_of(sample, truth) | (judge(sample) if name in (*MAIN, "average") else {})
        if task.fit and name in (*MAIN, "average"):
            place = samples.place(name)
            scores["fit psnr"] = fit_residual(write_run(sample, place, settings) if name == "average" else place)
        items.append({"toy": task.toy, "mode": task.mode, "variant": name, "scores": scores})
    return items


def scores_of(
    sample: Tensor,  # [V, F, 3, H, W] in 0..1 on white
    truth: Tensor,  # [V, F, 4, H, W], colour on white and alpha
) -> dict[str, float]:
    """Against the truth, on free cells: dB, SSIM, how much still pixels change, how much of the motion is there."""
    x, y, alpha = sample[:-1, 1:], truth[:-1, 1:, :3], truth[:-1, 1:, 3]
    flat = [(p.flatten(0, 1).permute(0, 2, 3, 1)) for p in (x, y)]
    similarity = [float(ssim(a, b)) for a, b in zip(*flat, strict=True)]
    return {
        "psnr": psnr(x, y),
        "psnr foreground": psnr_foreground(*(p.movedim(2, -1) for p in (x, y)), alpha),
        "ssim": statistics.fmean(similarity),
    } | over_time(zip(sample[:-1], truth[:-1], strict=True))


def fit_residual(run: Path) -> float:
    """PSNR in dB of a sample against the 4D Gaussians fitted to it: what no one object can show is lost."""
    reconstruct(run, preset="fast", sets=FIT_SETS, device="cpu", overwrite=True)
    model = Gaussians4D.load(run / "recon" / "main" / "gaussians.safetensors")
    return benchmark.measure(model, dataset.load(run), ReconstructConfig())["psnr"]


def write_run(
    cells: Tensor,  # [V, F, 3, H, W] in 0..1 on white
    folder: Path,
    c: GenerateConfig,
) -> Path:
    """Pictures that are no sample of a model, as a run folder that `d2 reconstruct` takes."""
    pictures = images.to_uint8(cells.movedim(2, -1).numpy())
    run = Run.open(folder) if is_run(folder) else Run.create(folder)
    run.write_matrix(lambda v, f: alpha_from_white(pictures[v, f]), c.frames, c.rig, {"source": "control"})
    return folder


class Samples:
    """Runs of one toy in one mode; the first makes the references that all share."""

    def __init__(self, folder: Path, mode: str, settings: GenerateConfig, preset, weights, sets) -> None:
        self.folder, self.mode, self.settings = folder, mode, settings
        self.options = {"preset": preset, "weights": weights, "remove_background": False, "device": "cpu"}
        self.sets = (*sets, "image_frame_ratio=null", "motion=127.0")

    def place(self, variant: str) -> Path:
        return self.folder / f"{self.mode}-{variant.replace(' ', '-')}"

    def references(self, which: str) -> list[Path]:
        return sorted((self.place("composed") / which).glob("*.png"))

    def sample(self, variant: str) -> ImageMatrix:
        """The matrix of a variant; one that is there already is kept."""
        video_is_true, views_are_true = MODES[self.mode]
        sets = (*self.sets, *VARIANTS.get(variant, ()))
        source = self.folder / ("row" if video_is_true else "front.png")
        views = self.folder / "column" if views_are_true else None
        if variant == ANCHOR:
            sets = (*sets, "anchor_frame=-1")
        elif variant != "composed":
            source, views = (self.place("composed") / which for which in (REFERENCE_VIDEO, REFERENCE_VIEWS))
            if not source.is_dir():
                self.sample("composed")
        generate(source, self.place(variant), views=views, sets=sets, keep_finished=True, **self.options)
        return Run.open(self.place(variant)).matrix()


class Judge:
    """How plausible each model finds a sample: the error of its estimate of the sample, noised again."""

    def __init__(self, pair: Pair, settings: GenerateConfig, samples: Samples) -> None:
        self.settings, self.stage = settings, pair.first_stage("frame")
        self.lines: dict[Model, Callable] = {}
        c = settings
        for model, which in (("view", REFERENCE_VIDEO), ("frame", REFERENCE_VIEWS)):
            found = [images.read_rgba(path)[0][..., :3] for path in samples.references(which)]
            pictures = torch.stack([to_tensor(picture) for picture in found])
            if model == "view":
                vector = pair.view_vector(torch.from_numpy(c.rig.elevation), model_angles(c.views), c.cond_aug_view)
            else:
                vector = pair.frame_vector(c.fps_id, c.motion, c.cond_aug_frame, c.frames)
            none = torch.zeros(3, c.size, c.size)
            conditions = pair.conditions(model, pictures, lambda line, none=none: none, vector, 0.0)
            self.lines[model] = pair.lines(model, conditions, len(conditions), guided_from=0.0)

    def __call__(
        self,
        sample: Tensor,  # [V, F, 3, H, W] in 0..1
    ) -> dict[str, float]:
        """Mean squared error of latents on free cells."""
        V, F = sample.shape[:2]
        nothing = torch.zeros(self.settings.latent)
        z = self.stage.encode(sample.flatten(0, 1) * 2 - 1, lambda cell: nothing).unflatten(0, (V, F))
        x = z + PROBE_SIGMA * matrix_noise(0, "probe", 0, V, F, self.settings.latent)
        return {
            f"error of the {model} model": float((lines(x, PROBE_SIGMA).cond - z)[:-1, 1:].square().mean())
            for model, lines in self.lines.items()
        }


def toy_matrix(index: int, c: GenerateConfig) -> np.ndarray:  # [V, F, 4, H, W] in 0..1: colour on white, alpha
    """Every view of a toy of the test split at every moment, moving at its usual amplitude."""
    return toybox.matrix(toybox.sample_toy("test", index).moved(1.0), c.rig, c.frames)


def _truth(index: int, c: GenerateConfig, folder: Path) -> Tensor:  # [V, F, 4, H, W]
    """`toy_matrix` as a tensor; its front picture, front row and first column as files."""
    pictures = toy_matrix(index, c)
    colours = images.to_uint8(np.moveaxis(pictures[:, :, :3], 2, -1))
    if not (folder / "front.png").exists():
        for v in range(c.views):
            images.write_png(folder / f"column/v{v:02d}.png", colours[v, 0])
        for f in range(c.frames):
            images.write_png(folder / f"row/f{f:03d}.png", colours[-1, f])
        images.write_png(folder / "front.png", colours[-1, 0])
    return torch.from_numpy(pictures)


def _all(c: GenerateConfig) -> tuple[list[int], list[int]]:
    return list(range(c.views)), list(range(c.frames))


def _items(work: Path, key: str) -> list[dict[str, Any]]:
    path = work / "items.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [item for item in map(json.loads, lines) if item["key"] == key]


def _done(work: Path, key: str) -> set[tuple[int, str]]:
    return {(item["toy"], item["mode"]) for item in _items(work, key)}
