"""Stage 2 from folder to folder: dataset in, 4D Gaussians, metrics and checkpoints out; wires everything else."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numba
import torch

from d2 import config as configuration
from d2 import destination, fileio, machine
from d2.errors import ConflictError, InputError, Stopped
from d2.recon import cameras, checkpoint, dataset, metrics_log, rig, train
from d2.recon.config import ReconstructConfig
from d2.recon.raster import choose_backend
from d2.recon.viewer import reference
from d2.run import Run, is_run

LOG_EVERY = 100  # steps between two lines of metrics.jsonl
SPACE_NEEDED = 64 * fileio.MB  # two checkpoints and a model of 100,000 Gaussians
DEFAULT_FPS = 24.0
MAX_NAME = 100  # bytes; temporary files beside it need a longer name
FIRST_USE = {
    "cpu": "its kernels compile on first use, about 20 s",
    "gsplat": "its kernels build on first use, one or two minutes",
}
MODEL = "gaussians.safetensors"
RIG = "rig.safetensors"  # the cameras that were found
PICTURES = ("generate", "import")  # stages of a run that leave pictures with cameras
# What pictures want that a model made, and that contradict each other: corrections of each and the rig that they were
# drawn with (benchmarks/robustness.py), no needles, and nothing faint that only one picture asked for.
DISAGREEING = {
    "min_scale": 0.3, "haze_weight": 0.1, "correct_blurs": True, "correct_colors": True, "correct_poses": True,
    "correct_times": True, "refine_rig": True,
}  # fmt: skip


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` made and how good it is."""

    folder: Path
    model: Path  # gaussians.safetensors
    psnr: float | None  # dB on held-out cells, None when none were held out
    gaussians: int
    iterations: int
    seconds: float


class Observer:
    """Told what happens; the command line draws a progress bar from it."""

    def message(self, text: str) -> None: ...

    def progress(self, progress: train.Progress, best_psnr: float | None) -> None: ...


def reconstruct(
    path: str | Path,
    out: str | Path | None = None,
    *,
    name: str = "main",
    preset: str | Path = "quality",
    sets: tuple[str, ...] = (),
    device: str = "auto",
    overwrite: bool = False,
    fps: float | None = None,
    observer: Observer | None = None,
    should_stop: Callable[[], int] = lambda: 0,
) -> Reconstruction:
    """Fits 4D Gaussians to a run folder, or to any folder with a transforms.json.

    Writes `<run>/recon/<name>/`: config.yaml, reference/ (pictures for the viewer), metrics.jsonl, ckpt/ and
    gaussians.safetensors.  A dataset of the user's own is never written to: its run folder is `out`, by default
    runs/<dataset name>.  An unfinished reconstruction with the same configuration is resumed, bit for bit on CPU;
    another one, or a finished one, raises ConflictError unless `overwrite`, which replaces it only after success.
    `should_stop()` returns a signal number to end early with everything saved (raises Stopped).  Raises InputError,
    SetupError, ResourceError, NumericalError; see their docstrings.
    """
    observer = observer or Observer()
    path = Path(path)
    settings = settled(configuration.load(ReconstructConfig, preset, sets=sets), is_generated(path))
    place = machine.choose_device(device)
    stage = f"reconstruct:{plain_name(name)}"
    _require_finished_input(path)
    dataset.find_transforms(path)
    home = _home(path, out)
    folder = home / "recon" / name
    resume_command = _resume_command(path, home, name, preset, sets, device, overwrite)
    destination.require_space(home, SPACE_NEEDED)
    if is_run(home):
        _target(Run.open(home), folder, stage, settings, overwrite)  # a conflict is told before images are read
    observer.message(f"Reading {fileio.quoted(path)}")
    data = dataset.load(path, size=settings.size or None)
    if len(data.views.unique()) < 2:
        raise InputError(f"{fileio.quoted(path)}: all frames have one camera pose; at least 2 are needed")
    run = Run.open(home) if is_run(home) else Run.create(home, fps if fps is not None else DEFAULT_FPS)
    with run.lock(), kernel_threads():
        fileio.undo_swap(folder)
        run.remove_leftovers()
        target = _target(run, folder, stage, settings, overwrite)  # again: another process may have been here
        if target != folder and ((target / MODEL).exists() or _difference(target, settings)):
            fileio.remove(target)  # an earlier replacement that was given up
        backend = choose_backend(place)
        observer.message(f"{len(data)} images, {data.width}×{data.height}")
        observer.message(f"Rasterizer: {backend.name}, because {backend.reason}; {FIRST_USE[backend.name]}")
        job = _Job(run, target, settings, data, place, observer, should_stop, resume_command, path)
        result = job.fit()
        if target != folder:
            run.drop_stage(stage)
            fileio.swap_folder(target, folder)
        record = {
            "psnr": result.best_psnr,
            "iterations": result.iteration,
            "gaussians": len(_best(result)),
            "config": configuration.digest(settings),
            "dataset": {"name": path.resolve().name, "digest": job.input},
            "files": {MODEL: fileio.sha256(folder / MODEL)},
        }
        if job.rig is not None:
            record["rig"] = job.rig
        run.commit_stage(stage, record)
    return Reconstruction(
        folder,
        folder / MODEL,
        result.best_psnr,
        len(_best(result)),
        result.iteration,
        sum(result.seconds.values()),
    )


@dataclass
class _Job:
    run: Run
    folder: Path
    settings: ReconstructConfig
    data: dataset.Dataset
    device: torch.device
    observer: Observer
    should_stop: Callable[[], int]
    resume_command: str
    path: Path
    rig: dict[str, Any] | None = None  # what refining it found

    def fit(self) -> train.State:
        self.input = self.data.digest()
        fileio.write_yaml(self.folder / "config.yaml", configuration.resolved(self.settings))
        resumed = self._resume()
        if self.settings.refine_rig:
            self._settle_rig(afresh=resumed is None)
        if self.settings.others_weight < 1:
            self.data = replace(self.data, weights=self._weights())
        state = resumed or self._start()
        reference.save(self.folder, self.data)
        cameras.save(self.folder, self.data)
        data = self.data.to(self.device)
        train.fit(state, data, self.settings, self._after_step)
        metadata = {"fps": f"{self.run.fps:g}", "frames": str(data.frames)}
        _best(state).save(self.folder / MODEL, metadata)
        return state

    def _settle_rig(self, afresh: bool) -> None:
        """Puts the cameras where a coarse fit finds them; a resumed run takes those that it began with."""
        path = self.folder / RIG
        if afresh:
            anchor = int((self.data.views == self._input_view()).nonzero()[0])
            refined, found = rig.refine(
                self.data, self.settings, anchor, self.device, self.observer.message, self._require_going_on
            )
            rig.save(path, refined, found)
            self.observer.message(f"Rig: {found}")
        self.data, self.rig = rig.load(path, self.data)

    def _weights(self) -> torch.Tensor:
        """[n] 1 for the input's own view and for the moment that the views were sampled from."""
        views, moments = self.data.views, self.data.times.unique()
        generated = Run.open(self.path).stage("generate") if is_run(self.path) else None
        anchor = int((generated or {}).get("anchor_frame", 0))
        trusted = (views == self._input_view()) | (self.data.times == moments[anchor])
        return torch.where(trusted, 1.0, self.settings.others_weight)

    def _input_view(self) -> int:
        """The view that the input is seen from: a run's last one, elsewhere the first."""
        return int(self.data.views.max()) if is_run(self.path) else int(self.data.views[0])

    def _require_going_on(self) -> None:
        signum = self.should_stop()
        if signum:
            raise Stopped(f"stopped while the rig was refined; begin again with: {self.resume_command}", signum)

    def _start(self) -> train.State:
        masks = self.data.has_alpha or self.data.plain_background
        self.observer.message("Carving the visual hull" if masks else "No masks: starting from random points")
        fileio.remove(self.folder / metrics_log.NAME)
        return train.start(self.data, self.settings, self.device)

    def _resume(self) -> train.State | None:
        for path in reversed(checkpoint.checkpoints(self.folder / "ckpt")):
            try:
                state, extra = checkpoint.load(path, self.device)
            except InputError as error:
                self.observer.message(f"Warning: {error}; trying an older one")
                continue
            if extra.get("data") != self.input:
                label = fileio.quoted(self.folder)
                raise ConflictError(
                    f"{label} was begun on other images or cameras; choose another --name or --overwrite"
                )
            train.equip(state, self.settings)
            fileio.truncate(self.folder / metrics_log.NAME, int(extra["log_bytes"]))
            self.observer.message(f"Resuming at iteration {state.iteration}")
            return state
        return None

    def _after_step(self, state: train.State, progress: train.Progress) -> None:
        log = self.folder / metrics_log.NAME
        if progress.validated or state.iteration % LOG_EVERY == 0:
            fileio.append_line(log, json.dumps(_log_record(progress), allow_nan=False))
        self.observer.progress(progress, state.best_psnr)
        signum = self.should_stop()
        if progress.validated or signum:
            extra = {"log_bytes": log.stat().st_size if log.exists() else 0, "data": self.input}
            checkpoint.save(self.folder / "ckpt", state, extra)
        if signum:
            raise Stopped(
                f"stopped at iteration {state.iteration}, all saved; go on with: {self.resume_command}",
                signum,
            )


def plain_name(name: str) -> str:
    """A reconstruction's name, refused when it is not a plain file name."""
    plain = name.isprintable() and not name.startswith(".") and not any(c in name for c in '/\\:*?"<>|')
    if not plain or not 1 <= len(name.encode()) <= MAX_NAME:
        raise InputError(f"--name {name!r}: expected a plain file name of at most {MAX_NAME} bytes")
    return name


def _home(path: Path, out: str | Path | None) -> Path:
    """The run folder that takes the result: the input itself when it is one; checked, not yet created."""
    source = path.resolve()
    default = path if is_run(path) else Path("runs") / (source.parent if source.is_file() else source).name
    home = default if out is None else Path(out)
    if not is_run(home):
        Run.require_free(home)
    return home


def _require_finished_input(path: Path) -> None:
    """Where the input is a run folder, its matrix is committed and its files are those that were committed."""
    if not is_run(path):
        return
    source = Run.open(path)
    stage = next((name for name in PICTURES if source.stage(name) is not None), None)
    if stage is None:
        raise ConflictError(
            f"{fileio.quoted(path)} holds no finished matrix; run d2 generate --resume first, or name the folder of"
            " the images"
        )
    source.require_intact(stage)


def settled(settings: ReconstructConfig, generated: bool) -> ReconstructConfig:
    """With the defaults that depend on whether a model made the pictures."""
    disagreement = generated if settings.disagreement is None else settings.disagreement
    unset = {
        name: value if disagreement else type(value)(0)
        for name, value in DISAGREEING.items()
        if getattr(settings, name) is None
    }
    return replace(settings, disagreement=disagreement, **unset)


def is_generated(path: Path) -> bool:
    """Whether a model made the pictures of a run folder."""
    stage = Run.open(path).stage("generate") if is_run(path) else None
    return stage is not None and "models" in stage


def _target(run: Run, folder: Path, stage: str, settings: ReconstructConfig, overwrite: bool) -> Path:
    """Where to work: `folder`, or beside it when it holds work that is to be replaced only after success.

    Raises ConflictError for finished work, and for unfinished work with another configuration.
    """
    if overwrite and ((folder / MODEL).exists() or checkpoint.checkpoints(folder / "ckpt")):
        destination.require_replaceable(folder)
        return fileio.sibling(folder, ".new")
    if run.stage(stage) is not None and (folder / MODEL).exists():
        raise ConflictError(f"{fileio.quoted(folder)} is finished; choose another --name or pass --overwrite")
    difference = _difference(folder, settings)
    if difference:
        raise ConflictError(
            f"{fileio.quoted(folder)} holds an unfinished run with another configuration ({difference});"
            " repeat that one, choose another --name or pass --overwrite"
        )
    return folder


def _difference(folder: Path, settings: ReconstructConfig) -> str | None:
    """The first field in which the unfinished work in a folder differs; None when nothing does or nothing is there."""
    if not checkpoint.checkpoints(folder / "ckpt"):
        return None
    old = fileio.read_yaml(folder / "config.yaml")
    return configuration.first_difference(old if isinstance(old, dict) else {}, configuration.resolved(settings))


def _resume_command(
    path: Path, home: Path, name: str, preset: str | Path, sets: tuple[str, ...], device: str, overwrite: bool
) -> str:
    """The same command again, fit for a shell."""
    folders = [path] if path.resolve() == home.resolve() else [path, home]
    words = [f"./{folder}" if str(folder).startswith("-") else str(folder) for folder in folders]
    words = ["d2", "reconstruct", words[0], *(["--out", words[1]] if len(words) > 1 else [])]
    for option, value, default in (("name", name, "main"), ("preset", preset, "quality"), ("device", device, "auto")):
        words += [f"--{option}", str(value)] if value != default else []
    words += [word for text in sets for word in ("--set", text)]
    return shlex.join([*words, *(["--overwrite"] if overwrite else [])])


def _log_record(progress: train.Progress) -> dict[str, Any]:
    loss = float(progress.loss)
    record: dict[str, Any] = {"iteration": progress.iteration, "loss": loss if math.isfinite(loss) else None}
    record["gaussians"] = progress.gaussians
    if progress.psnr is not None:
        record |= {"psnr_heldout": round(progress.psnr, 4), "best": progress.is_best}
    return record


def _best(state: train.State):
    assert state.best is not None
    return state.best


@contextlib.contextmanager
def kernel_threads() -> Iterator[None]:
    """One torch thread while the numba kernels have them all: two pools on one set of cores cost 5×."""
    before = torch.get_num_threads()
    numba.get_num_threads()  # starts numba's pool now: its OpenMP start-up resets torch's thread count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
