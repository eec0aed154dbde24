"""From a reconstruction to files other programs open: PLY sequence, turntable video, contact sheet."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from d2 import fileio, images
from d2.errors import ConflictError, InputError
from d2.recon import render
from d2.recon.formats import ply, sequence
from d2.recon.formats.frames import Frame
from d2.recon.gaussians import Gaussians4D
from d2.run import Run, frame_time, is_run

GAUSSIANS = "gaussians.safetensors"  # the result of a reconstruction, in its folder
STAGE_PREFIX = "reconstruct:"
DEFAULT_FPS, DEFAULT_FRAMES = 24.0, 25
MAX_FRAMES = 100_000
CONTACT_COLUMNS = 6  # at most

Progress = Callable[[str, int, int], None]  # format, done, total


class Source(NamedTuple):
    """A reconstruction found on disk, and how it plays."""

    gaussians: Gaussians4D
    folder: Path | None  # the one that holds gaussians.safetensors
    name: str
    fps: float
    frames: int


@dataclass(frozen=True)
class Clip:
    """What an export function needs."""

    gaussians: Gaussians4D
    name: str
    times: np.ndarray  # [F] in 0..1; one moment: a single file instead of a sequence
    fps: float
    layout: ply.Layout
    size: int  # pixels, of the video
    overwrite: bool
    progress: Progress
    still: bool  # a chosen moment, not a clip


def export(
    source: str | Path | Gaussians4D,
    formats: Sequence[str] = ("ply", "mp4", "contact"),
    out: str | Path | None = None,
    *,
    fps: float | None = None,
    frames: int | None = None,
    time: float | None = None,
    name: str | None = None,
    overwrite: bool = False,
    frame: Frame = "rdf",
    pad_sh3: bool = False,
    prune_opacity: float = 0.0,
    size: int = 512,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Path]:
    """Writes a reconstruction in the formats asked for and returns the path of each.

    `source` is a run folder (its newest reconstruction), a reconstruction's folder, its
    gaussians.safetensors or the Gaussians themselves (then `out` is needed).  `out` is by default the folder
    `export` beside them; in it lie `ply/<name>_0001.ply` … with frames.json, `turntable.mp4` and
    `contact.png`.  `fps` and `frames` are by default what the run or the file says, else 24 and 25.  With
    `time` (0..1) everything shows that moment, and the PLY is one file, `<name>.ply`.  `frame`, `pad_sh3`
    and `prune_opacity` are those of `formats.ply.Layout`; `size` is the video's, in pixels.

    Raises InputError for what cannot be used and ConflictError for a file that exists without `overwrite`;
    both before anything is written.  Every output appears whole or not at all.
    """
    wanted = _known(formats)
    _check_ranges(fps, frames, time, size)
    layout = ply.Layout(frame, pad_sh3, prune_opacity)
    found = _in_memory(source) if isinstance(source, Gaussians4D) else find(source)
    folder = _output_folder(out, found)
    count = frames or found.frames
    clip = Clip(
        found.gaussians, found.name if name is None else name,
        np.array([frame_time(k, count) for k in range(count)] if time is None else [time]),
        fps or found.fps, layout, size, overwrite, progress, time is not None,
    )  # fmt: skip
    sequence.check_name(clip.name)
    if len(clip.gaussians) == 0:
        raise InputError("nothing to export: there are no Gaussians")
    targets = {what: folder / file_name(what, clip) for what in wanted}
    for target in targets.values():
        _check_free(target, overwrite)
    if "ply" in wanted:
        each = clip.layout.bytes_per_gaussian(clip.gaussians.sh_degree) * len(clip.gaussians)
        fileio.require_space(folder, each * len(clip.times))
    for what, target in targets.items():
        FORMATS[what](clip, target)
    return targets


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
    _check_ranges(fps, int(frames))
    return Source(gaussians, file.parent, _as_name(file.parent), fps, int(frames))


def file_name(what: str, clip: Clip) -> str:
    """Where a format goes within the export folder."""
    names = {
        "ply": f"{clip.name}.ply" if clip.still else "ply",
        "mp4": "turntable.mp4",
        "contact": "contact.png",
    }
    return names[what]


# -- formats ---------------------------------------------------------------------------------------------


def write_ply(clip: Clip, target: Path) -> None:
    """One file for a moment, a folder for a clip."""
    if clip.still:
        time = float(clip.times[0])
        ply.write(clip.gaussians.at(time), target, clip.layout, [f"time {time:.9g}"])
        clip.progress("ply", 1, 1)
        return
    ply.write_sequence(
        clip.gaussians, target, clip.name, clip.times, clip.fps, clip.layout, overwrite=clip.overwrite,
        progress=lambda done, total: clip.progress("ply", done, total),
    )  # fmt: skip


def write_turntable(clip: Clip, target: Path) -> None:
    """One turn of the camera over whole plays of the clip, on white."""
    times = render.loop_times(clip.times, clip.fps)
    pictures = render.turntable(clip.gaussians, times, clip.size, clip.size)
    images.write_mp4(target, _counted(pictures, len(times), clip.progress), clip.fps)


def write_contact(clip: Clip, target: Path) -> None:
    """Four sides at up to six moments."""
    columns = np.unique(np.linspace(0, len(clip.times) - 1, CONTACT_COLUMNS).round().astype(int))
    sheet = render.contact_sheet(
        clip.gaussians,
        clip.times[columns],
        progress=lambda done, total: clip.progress("contact", done, total),
    )
    images.write_png(target, sheet)


FORMATS: dict[str, Callable[[Clip, Path], None]] = {
    "ply": write_ply,
    "mp4": write_turntable,
    "contact": write_contact,
}


def _counted(pictures: Iterator[np.ndarray], total: int, progress: Progress) -> Iterator[np.ndarray]:
    for index, picture in enumerate(pictures):
        yield picture
        progress("mp4", index + 1, total)


# -- what to read and where to write ---------------------------------------------------------------------


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


def _in_memory(gaussians: Gaussians4D) -> Source:
    return Source(gaussians, None, "asset", DEFAULT_FPS, DEFAULT_FRAMES)


def _as_name(folder: Path) -> str:
    """What files of a reconstruction's folder, <asset>/recon/<name> by custom, are called."""
    folder = folder.absolute()
    asset = folder.parent.parent if folder.parent.name == "recon" else folder
    return re.sub(r'[\0-\x1f/\\:*?"<>|]', "_", asset.name).lstrip(".- ")[:100] or "asset"


def _output_folder(out: str | Path | None, found: Source) -> Path:
    """Where to write; that it can be written to is known before any work."""
    if out is None and found.folder is None:
        raise InputError("Gaussians in memory have no folder of their own; pass out=…")
    if out is not None and str(out) in ("", "-"):
        raise InputError(f"--out must be a folder, got {str(out)!r}")
    folder = Path(out) if out is not None else Path(found.folder or ".") / "export"
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{fileio.quoted(existing)} is a file; exports go into a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{fileio.quoted(existing)} cannot be written to; choose another --out")
    return folder


def _check_free(target: Path, overwrite: bool) -> None:
    if target.suffix == "":
        sequence.check_replaceable(target, overwrite)
    elif target.is_dir():
        raise InputError(f"{fileio.quoted(target)} is a folder; choose another --out")
    elif os.path.lexists(target) and not overwrite:
        raise ConflictError(f"{fileio.quoted(target)} exists; pass --overwrite or choose another --out")


def _known(formats: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(text.strip() for text in formats))
    unknown = [text for text in wanted if text not in FORMATS]
    if unknown or not wanted:
        raise InputError(f"unknown format {', '.join(map(repr, unknown)) or 'list'}; known: {', '.join(FORMATS)}")
    return wanted


def _check_ranges(
    fps: float | None,
    frames: int | None,
    time: float | None = None,
    size: int = 512,
) -> None:
    checks = [
        ("fps", fps, fps is None or 0 < fps <= 1000, "0..1000"),
        ("frames", frames, frames is None or 1 <= frames <= MAX_FRAMES, f"1..{MAX_FRAMES}"),
        ("time", time, time is None or 0 <= time <= 1, "0..1"),
        ("size", size, 16 <= size <= 4096, "16..4096 pixels"),
    ]
    for what, value, good, expected in checks:
        if not good:
            raise InputError(f"{what} must be in {expected}, got {value!r}")
