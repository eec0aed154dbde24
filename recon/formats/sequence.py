"""A numbered sequence of splat files with its frames.json: one folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2 import destination, fileio
from d2.errors import ConflictError, InputError

MANIFEST = "frames.json"  # beside the files of a sequence; its presence says that the sequence is whole
_NAME = re.compile(r'[^\0-\x20/\\:*?"<>|.-][^\0-\x1f/\\:*?"<>|]{0,199}')

Progress = Callable[[int, int], None]  # done, total


def write(
    encode: Callable[[float], bytes],  # time in 0..1 -> the content of one file
    folder: str | Path,
    name: str,
    suffix: str,  # ".ply"
    times: Sequence[float] | np.ndarray,  # [F] in 0..1
    fps: float,
    *,
    overwrite: bool = False,
    beside: dict[str, bytes] | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Writes `<name>_0001<suffix>` …, what stands `beside` them and frames.json into `folder`.

    Raises ConflictError when `folder` exists and is not to be overwritten, or was not written by this function.
    """
    _check_clip(times, fps)
    with writing(folder, name, suffix, len(times), fps, overwrite=overwrite, beside=beside) as add:
        for index, time in enumerate(times):
            add(encode(float(time)), float(time))
            progress(index + 1, len(times))
    return Path(folder)


@contextlib.contextmanager
def writing(
    folder: str | Path,
    name: str,
    suffix: str,
    count: int,
    fps: float,
    *,
    overwrite: bool = False,
    beside: dict[str, bytes] | None = None,
    about: dict[str, Any] | None = None,
) -> Iterator[Callable[[bytes, float], None]]:
    """Yields what takes the content and the time of one file after the other; like `write`, whole or not at all.

    `about` is told in frames.json besides the rate and the files.
    """
    folder = Path(folder)
    check_name(name)
    entries: list[dict[str, Any]] = []
    with replacing(folder, overwrite) as temporary:

        def add(content: bytes, time: float) -> None:
            file = file_name(name, suffix, len(entries), count)
            fileio.atomic_write(temporary / file, content)
            entries.append({"file": file, "time": time})

        yield add
        for file, content in (beside or {}).items():
            fileio.atomic_write(temporary / file, content)
        fileio.write_json(temporary / MANIFEST, {"fps": fps, **(about or {}), "frames": entries})


@contextlib.contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to fill, frames.json last, that takes the place of `folder` once it is whole.

    What a process that was killed left here goes.  Raises what `check_replaceable` raises, before anything is
    written.
    """
    fileio.undo_swap(folder)
    check_replaceable(folder, overwrite)
    temporary = fileio.sibling(folder, f".{os.getpid()}.new")
    for left in temporary.parent.glob(f"{glob.escape(fileio.sibling(folder, '').name)}.*.new"):
        if not _is_at_work(left.suffixes[-2][1:]):
            fileio.remove(left)
    try:
        yield temporary
        fileio.swap_folder(temporary, folder)
    finally:
        fileio.remove(temporary)


def _is_at_work(pid: str) -> bool:
    """Whether another process has this number; of what is no number nothing is known."""
    if not pid.isdecimal() or int(pid) == os.getpid():
        return not pid.isdecimal()
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def file_name(name: str, suffix: str, index: int, count: int) -> str:
    """What file `index` of `count` is called: numbers from 1, in four digits or more."""
    return f"{name}_{index + 1:0{max(4, len(str(count)))}d}{suffix}"


def check_replaceable(folder: str | Path, overwrite: bool) -> None:
    """Raises ConflictError unless a sequence may be put at `folder`; a foreign folder is never replaced.

    InputError where nothing can take its place: see destination.require_replaceable.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        return
    if not (folder / MANIFEST).is_file():
        raise ConflictError(f"{fileio.quoted(folder)} is not a sequence that d2 wrote; choose another --out")
    if not overwrite:
        raise ConflictError(f"{fileio.quoted(folder)} exists; pass --overwrite or choose another --out")
    destination.require_replaceable(folder)


def check_name(name: str) -> None:
    """Raises InputError unless files may be called `name` and something, on any system."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be the beginning of a file name; pass another --name")


def _check_clip(times: Sequence[float] | np.ndarray, fps: float) -> None:
    if len(times) == 0 or not all(0 <= float(time) <= 1 for time in times):
        raise InputError("a sequence needs at least one time, each in 0..1")
    if not 0 < fps <= 1000:
        raise InputError(f"fps must be in 0..1000, got {fps}")
