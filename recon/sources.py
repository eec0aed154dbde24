"""Finds the reconstruction that a path names, and how it plays."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from d2 import fileio
from d2.errors import ConflictError, InputError
from d2.recon.gaussians import Gaussians4D
from d2.run import Run, is_run

GAUSSIANS = "gaussians.safetensors"  # the result of a reconstruction, in its folder
STAGE_PREFIX = "reconstruct:"
DEFAULT_FPS, DEFAULT_FRAMES = 24.0, 25
MAX_FRAMES = 100_000


class Source(NamedTuple):
    """A reconstruction found on disk, and how it plays."""

    gaussians: Gaussians4D
    folder: Path | None  # the one that holds gaussians.safetensors
    name: str
    fps: float
    frames: int
    run: Run | None = None  # that it belongs to


def find(path: str | Path) -> Source:
    """The reconstruction that `path` names, read and checked.

    Raises InputError for what is none and ConflictError for a run that has not got so far.
    """
    file = _gaussians_file(Path(path))
    gaussians, metadata = Gaussians4D.load_with_metadata(file)
    run = _run_of(file.parent)
    stage = (run.stage("generate") if run else None) or {}
    label = fileio.quoted(file)
    fps = run.fps if run else _number(metadata.get("fps", DEFAULT_FPS), f"{label}: fps")
    frames = _number(stage.get("frames", metadata.get("frames", DEFAULT_FRAMES)), f"{label}: frames")
    check_playback(fps, frames)
    return Source(gaussians, file.parent, _as_name(file.parent), fps, int(frames), run)


def in_memory(gaussians: Gaussians4D) -> Source:
    """Gaussians that no file holds, at the usual rate and length."""
    return Source(gaussians, None, "asset", DEFAULT_FPS, DEFAULT_FRAMES)


def check_playback(fps: float | None, frames: float | None) -> None:
    """Raises InputError for a rate or a length that nothing plays at; None is unset."""
    if fps is not None and not 0 < fps <= 1000:
        raise InputError(f"fps must be in 0..1000, got {fps!r}")
    if frames is not None and not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"frames must be in 1..{MAX_FRAMES}, got {frames!r}")


def _gaussians_file(path: Path) -> Path:
    label = fileio.quoted(path)
    if not path.is_dir():
        if path.exists() and path.suffix != ".safetensors":
            raise InputError(f"{label} is neither a run folder nor a {GAUSSIANS}")
        return path  # a missing file gets its message where it is read
    if (path / GAUSSIANS).is_file():
        return path / GAUSSIANS
    if is_run(path):
        stages = [stage for stage in Run.open(path).manifest["stages"] if stage.startswith(STAGE_PREFIX)]
        if stages:  # the newest is last: a stage that is done again is dropped first
            return fileio.inside(path, f"recon/{stages[-1].removeprefix(STAGE_PREFIX)}/{GAUSSIANS}")
    finished = sorted(path.glob(f"recon/*/{GAUSSIANS}"))
    if len(finished) > 1:
        names = ", ".join(fileio.quoted(file.parent) for file in finished[:3])
        raise InputError(f"{label} holds {len(finished)} reconstructions; name one of them: {names}")
    if finished:
        return finished[0]
    if is_run(path):
        raise ConflictError(f"{label} has no finished reconstruction; run: d2 reconstruct {label}")
    raise InputError(f"{label} is neither a run folder nor a reconstruction: no run.json, no {GAUSSIANS}")


def _run_of(folder: Path) -> Run | None:
    """The run that a reconstruction's folder (<run>/recon/<name>) belongs to."""
    recon = folder.absolute().parent
    return Run.open(recon.parent) if recon.name == "recon" and is_run(recon.parent) else None


def _number(value: object, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{what} must be a number, got {value!r}")
    return number


def _as_name(folder: Path) -> str:
    """What files of a reconstruction's folder, <asset>/recon/<name> by custom, are called."""
    folder = folder.absolute()
    asset = folder.parent.parent if folder.parent.name == "recon" else folder
    return re.sub(r'[\0-\x1f/\\:*?"<>|]', "_", asset.name).lstrip(".- ")[:100] or "asset"
