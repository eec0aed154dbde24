"""Stage 1 from input to run folder: checks everything cheap first, then hands the folder to the phases."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from d2 import asset, budget, cells, destination, fileio, images, inputs, launch, origin, preprocess
from d2 import config as configuration
from d2.asset import Asset
from d2.denoiser import OwnDenoiser
from d2.errors import ConflictError, InputError
from d2.matrix import cell_path
from d2.models.conditioner import Conditioning
from d2.origin import CONFIG, Source
from d2.pair import Model, check_size, model_angles
from d2.phases import INPUT, KEPT, REFERENCE_VIDEO, REFERENCE_VIEWS, Job, Observer
from d2.run import MANIFEST, Run, is_run
from d2.sampler import anchor, plan
from d2.settings import TRAINED, GenerateConfig

STAGE = "generate"
DEFAULT_FPS = 24.0
BYTES_A_PIXEL = 4  # of a cell as PNG, at worst
SHAPE = ("views", "frames", "size", "elevation_deg", "elevations_deg", "radius", "fov_deg", "clockwise")


# x [B, T, C, h, w], sigma [B], what B sequences are conditioned on -> the clean estimate, like x
Function = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Generation:
    """What `generate` made."""

    folder: Path  # the run
    views: int
    frames: int
    seconds: float
    finished: bool  # False after `references_only`


def generate(
    source: str | Path | Asset,
    out: str | Path | None = None,
    *,
    preset: str | Path = "full",
    sets: tuple[str, ...] = (),
    weights: str | Path | None = None,
    device: str = "auto",
    views: str | Path | None = None,
    mask: str | Path | None = None,
    remove_background: bool = True,
    overwrite: bool = False,
    keep_finished: bool = False,
    references_only: bool = False,
    redo: str | None = None,
    processes: int = 1,
    view_denoiser: Function | None = None,
    frame_denoiser: Function | None = None,
    observer: Observer | None = None,
    should_stop: Callable[[], int] = lambda: 0,
) -> Generation:
    """Turns an image, a folder of frames, a video or a 3D asset into a run folder: V views × F frames and cameras.

    `out` is by default runs/<name of the input>.  `views` is a folder of reference views, the last one the
    input's; `mask` a file or a folder of masks.  An unfinished run with the same input, weights and
    configuration is resumed, bit for bit on CPU; another one, or a finished one, raises ConflictError unless
    `overwrite`, which replaces it only after success, or `keep_finished`, which returns it.  With
    `references_only` it ends after phase 1, so that the references can be retouched before the same call goes on.
    `redo` (`views=3,4` or `frames=0`) samples these rows or columns of a finished run again, on its references as
    they lie there, and keeps every other cell; seed and sampler may differ, the folder is replaced after success, and
    what was reconstructed from the old matrix goes with it, which needs `overwrite`.
    `processes` ranks share the work, each with a GPU or a part of the CPU; or those that torchrun started.
    `view_denoiser` and `frame_denoiser`, functions of x, sigma and conditioning (d2.adapters), stand in for a model's
    UNet; resuming compares their names only.  `should_stop()` returns a signal number to end early, saved (Stopped).

    Raises InputError for input and configuration, SetupError for weights and packages, ResourceError for disk and
    memory, NumericalError (step, model, cell) where an estimate is not finite, WorkerError where a rank was lost.
    """
    begin, observer = time.monotonic(), observer or Observer()
    settings = configuration.load(GenerateConfig, configuration.preset_path(preset, "generate"), sets=sets)
    own = _check_settings(settings, observer, {"view": view_denoiser, "frame": frame_denoiser}, processes)
    if launch.helps():
        launch.help_out(launch.load(settings, weights, device, own), settings)
        return Generation(Path(out or ""), settings.views, settings.frames, time.monotonic() - begin, False)
    given = _read(source, settings, views, mask, remove_background, observer)
    source, solid = (Path(source), False) if isinstance(source, str | Path) else (source.path, True)
    home = Path(out) if out is not None else Path("runs") / source.resolve().stem
    again = cells.parse(redo, settings.views, settings.frames) if redo is not None else None
    _require_place(home, overwrite or keep_finished or again is not None)
    if again:
        _require_same_shape(home, settings, overwrite)
    pair = launch.load(settings, weights, device, own)
    destination.require_space(home, _space(settings))
    observer.message("Taking the checksums of the models")
    identity = origin.identity(settings, source, given, pair) | _redo_identity(home, redo)
    done = Generation(home, settings.views, settings.frames, 0.0, True)
    with launch.gathered(pair, settings, processes) as pair:
        if keep_finished and _is_finished(home) and not origin.difference(home, identity):
            return done
        target = _target(home, identity, overwrite or again is not None)
        pictures = {}
        if not (target / CONFIG).exists():
            pictures = _from_finished(home) if again else _prepare(given, settings, observer)
        words = ["--asset"] * solid + [fileio.quoted(source)]
        command = _resume_command(words, home, preset, sets, weights, views, mask, remove_background, overwrite)
        command += f" --cells {redo}" * bool(redo) + f" --gpus {processes}" * (processes > 1)
        command = "the same call of d2.generate" if own else command
        with _held(home, target, settings.fps or given.clip.fps or DEFAULT_FPS) as run:
            if pictures:
                _write_inputs(run.folder, pictures, identity)
            fitted = budget.fitted(settings, pair.device)
            job = Job(run, fitted, pair, origin.digest(identity), observer, should_stop, command, again)
            job.references()
            if not references_only:
                job.draw(job.matrix(), origin.record(identity, settings, given, pair))
    if references_only:
        return replace(done, folder=target, seconds=time.monotonic() - begin, finished=False)
    if target != home:
        fileio.swap_folder(target, home)
    return replace(done, seconds=time.monotonic() - begin)


def _check_settings(
    settings: GenerateConfig, observer: Observer, given: dict[Model, Function | None], processes: int
) -> dict[Model, OwnDenoiser]:
    """The denoisers that are given, after everything that needs no input was checked."""
    own: dict[Model, OwnDenoiser] = {
        model: OwnDenoiser(function) for model, function in given.items() if function is not None
    }
    if own and processes > 1:
        raise InputError(
            f"processes is {processes}; a denoiser of your own stays in its process: 1, or torchrun's ranks"
        )
    if "view" in own and settings.conv_blend is not None:
        raise InputError("conv_blend changes the view model's UNet, which view_denoiser stands in for; leave it off")
    check_size(settings.size, settings)
    plan(settings, model_angles(settings.views), settings.frames)
    anchor(settings, settings.frames)
    assert len(settings.rig.azimuth) == settings.views
    for name, trained in TRAINED.items():
        number = getattr(settings, name)
        if number != trained and settings.view_source:
            observer.message(f"Warning: {name} is {number}; the official weights were trained at {trained}")
    return own


def _read(
    source: str | Path | Asset,
    settings: GenerateConfig,
    views: str | Path | None,
    mask: str | Path | None,
    remove_background: bool,
    observer: Observer,
) -> Source:
    if not isinstance(source, str | Path):
        return _drawn(source, settings, views, mask)
    clip = inputs.read(source, settings.frames, settings.pick, observer.message)
    if mask is not None:
        clip = inputs.with_masks(clip, mask)
    if not clip.opaque:
        inputs.require_foreground(clip)
    given = None
    if views is not None:
        given = inputs.read(views, settings.views, "even", observer.message, "views")
        if len(given) != settings.views:
            raise InputError(f"{fileio.quoted(views)}: expected {settings.views} views, got {len(given)}")
    return Source(clip, given, remove_background)


def _drawn(source: Asset, settings: GenerateConfig, views: str | Path | None, mask: str | Path | None) -> Source:
    """The asset from every camera, and its front view in the place of the user's picture."""
    if views is not None or mask is not None:
        raise InputError(f"{fileio.quoted(source.path)} is drawn from every view; leave out --views and --mask")
    pictures = asset.views(source, settings.rig, settings.image_frame_ratio, settings.asset_up, settings.asset_turn_deg)
    clip = inputs.clip_of(list(pictures), [f"{source.path.name}#{v}" for v in range(settings.views)])
    inputs.require_foreground(clip)
    return Source(inputs.clip_of([clip.pictures[-1]], [source.path.name]), clip, False, placed=True)


def _require_place(home: Path, may_exist: bool) -> None:
    """The cheap half of `_target`: raises for a place where no run can be, or where a finished one is.

    A run that died while it replaced the one at `home` is undone first.
    """
    fileio.undo_swap(home)
    if not is_run(home):
        Run.require_free(home)
    elif _is_finished(home) and not may_exist:
        raise ConflictError(f"{fileio.quoted(home)} is finished; choose another --out or pass --overwrite")


def _target(home: Path, identity: dict[str, Any], overwrite: bool) -> Path:
    """Where to work: `home`, or beside it when its work is to be replaced only after success."""
    if not is_run(home):
        return home
    run = Run.open(home)
    if overwrite:
        destination.require_replaceable(home)
        beside = fileio.sibling(home, ".new")
        if beside.exists() and (not is_run(beside) or _is_finished(beside) or origin.difference(beside, identity)):
            fileio.remove(beside)  # left by an interrupted --overwrite of another kind
        return beside
    if run.stage(STAGE) is not None:
        raise ConflictError(f"{fileio.quoted(home)} is finished; choose another --out or pass --overwrite")
    if run.manifest["stages"]:
        raise ConflictError(f"{fileio.quoted(home)} holds other work; choose another --out")
    difference = origin.difference(home, identity)
    if difference:
        raise ConflictError(
            f"{fileio.quoted(home)} holds an unfinished run with another configuration ({difference}); "
            "repeat that one, choose another --out or pass --overwrite"
        )
    return home


@contextlib.contextmanager
def _held(home: Path, target: Path, fps: float) -> Iterator[Run]:
    """The run at `target`, created where it is not there, locked; what it will replace is locked too."""
    with contextlib.ExitStack() as locks:
        if target != home:
            locks.enter_context(Run.open(home).lock())
        run = Run.open(target) if is_run(target) else Run.create(target, fps)
        locks.enter_context(run.lock())
        # Opened again under the lock: another process may have finished it meanwhile.
        if Run.open(target).stage(STAGE) is not None:
            raise ConflictError(f"{fileio.quoted(target)} was finished by another process")
        run.remove_leftovers()
        yield run


def _prepare(given: Source, settings: GenerateConfig, observer: Observer) -> dict[str, Image.Image | np.ndarray]:
    """Path in the run folder -> picture, of everything the input alone decides."""
    clip = given.clip
    if clip.opaque and given.remove_background:
        clip = inputs.without_background(clip, observer.message, settings.rembg_model)
        inputs.require_foreground(clip)
    squares = (
        clip.pictures
        if given.placed
        else preprocess.squares(clip.pictures, settings.image_frame_ratio, settings.box, settings.size)
    )
    made: dict[str, Image.Image | np.ndarray] = {f"{INPUT}/f{i:03d}.png": square for i, square in enumerate(squares)}
    if len(clip) > 1:
        made |= {f"{REFERENCE_VIDEO}/f{i:03d}.png": preprocess.on_white(square) for i, square in enumerate(squares)}
    if given.views is not None:
        for v, view in enumerate(given.views.pictures):
            square = preprocess.recentre(view, preprocess.whole(view), max(view.size), settings.size)
            made[f"{REFERENCE_VIEWS}/v{v:02d}.png"] = preprocess.on_white(square)
    return made


def _from_finished(home: Path) -> dict[str, Image.Image | np.ndarray]:
    """What `redo` starts from: the input, the references as they lie there, and every cell."""
    made: dict[str, Image.Image | np.ndarray] = {}
    for folder in (INPUT, REFERENCE_VIDEO, REFERENCE_VIEWS):
        made |= {f"{folder}/{path.name}": images.open_image(path) for path in sorted((home / folder).glob("*.png"))}
    matrix = Run.open(home).matrix()
    for v in range(matrix.views):
        made |= {f"{KEPT}/{cell_path(v, f)}": matrix[v, f] for f in range(matrix.frames)}
    return made


def _require_same_shape(home: Path, settings: GenerateConfig, overwrite: bool) -> None:
    """Raises unless `home` is a finished run whose cells and cameras are those of `settings`, and nothing more."""
    if not _is_finished(home):
        raise ConflictError(f"--cells: {fileio.quoted(home)} is not a finished run; generate it first")
    others = [name for name in Run.open(home).manifest["stages"] if name != STAGE]
    if others and not overwrite:
        raise ConflictError(f"--cells: {fileio.quoted(home)} also holds {others[0]}; pass --overwrite to drop it")
    old = fileio.read_yaml(home / CONFIG)
    new = json.loads(json.dumps(configuration.resolved(settings)))
    old = old if isinstance(old, dict) else {}
    difference = configuration.first_difference({k: old.get(k) for k in SHAPE}, {k: new[k] for k in SHAPE})
    if difference:
        raise ConflictError(f"--cells: {fileio.quoted(home)} has another shape ({difference}); repeat that one")


def _redo_identity(home: Path, redo: str | None) -> dict[str, Any]:
    """What a part sampled again depends on: which part, of which matrix."""
    return {} if redo is None else {"cells": redo, "cells_of": fileio.sha256(home / MANIFEST)}


def _write_inputs(folder: Path, pictures: dict[str, Image.Image | np.ndarray], identity: dict[str, Any]) -> None:
    """The configuration goes last: where it is, the inputs are complete."""
    for path, picture in pictures.items():
        images.write_png(folder / path, np.asarray(picture))
    fileio.write_yaml(folder / CONFIG, identity)


def _is_finished(folder: Path) -> bool:
    return is_run(folder) and Run.open(folder).stage(STAGE) is not None


def _space(settings: GenerateConfig) -> int:
    """Bytes of disk: every cell as PNG, references, and two states with their estimates while one replaces another."""
    cells = settings.views * settings.frames + 2 * (settings.views + settings.frames)
    latent = 4 * math.prod(settings.latent)
    return cells * settings.size**2 * BYTES_A_PIXEL + 4 * settings.views * settings.frames * latent


def _resume_command(
    source: list[str],
    home: Path,
    preset: str | Path,
    sets: tuple[str, ...],
    weights: str | Path | None,
    views: str | Path | None,
    mask: str | Path | None,
    remove_background: bool,
    overwrite: bool,
) -> str:
    words = ["d2 generate", *source, f"--out {fileio.quoted(home)}"]
    words += [f"--preset {fileio.quoted(preset)}"] if str(preset) != "full" else []
    for name, value in (("weights", weights), ("views", views), ("mask", mask)):
        words += [f"--{name} {fileio.quoted(value)}"] if value is not None else []
    words += [f"--set {text}" for text in sets]
    words += ["--no-remove-bg"] * (not remove_background) + ["--overwrite"] * overwrite
    return " ".join(words)
