"""The Gaussians of a USD file."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from d2 import fileio
from d2.errors import InputError
from d2.recon.formats import usd, usd_arrays, values
from d2.recon.formats.frames import from_frame
from d2.recon.formats.values import Values
from d2.recon.gaussians import Gaussians3D

MAX_FRAMES = 100_000  # that a file is believed to play
PATIENCE = 600.0  # seconds


def read(path: str | Path, frame: float | None = None) -> Gaussians3D:
    """Gaussians in our world from the first splat prim of a USD file at a time code (default: the first).

    Raises InputError for a file that cannot be opened or holds none, SetupError without usd-core.
    """
    return read_clip(path, frame)[0]


def read_clip(path: str | Path, frame: float | None = None) -> tuple[Gaussians3D, int, float]:
    """The same, how many frames it plays, and how many a second."""
    usd.modules()
    label = fileio.quoted(path)
    if not Path(path).is_file():
        raise InputError(f"{label} does not exist")
    words = [str(path), *([] if frame is None else [str(frame)])]
    *arrays, (z_up, start, end, fps) = _arrays(words, label)
    if not all(map(math.isfinite, (start, end, fps))) or end - start > MAX_FRAMES or not 0 < fps <= 1000:
        raise InputError(f"{label} plays from {start:g} to {end:g} at {fps:g} a second; expected 0..1000 a second")
    found = from_frame(values.gaussians(Values(*arrays), label), "world" if z_up else "rub")
    return found, max(1, round(end - start) + 1), float(fps)


def _arrays(words: list[str], label: str) -> list[np.ndarray]:
    """What usd_arrays writes, in a process of its own, which the file may end."""
    call = [sys.executable, "-P", usd_arrays.__file__, *words]
    try:
        done = subprocess.run(call, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise InputError(f"{label} took usd-core more than {PATIENCE:g} s") from None
    if done.returncode == 3:
        raise InputError(f"{label} {done.stderr.decode(errors='replace').splitlines()[-1]}")
    if done.returncode:
        raise InputError(f"{label} is not a readable USD file: usd-core ended with {done.returncode} over it")
    stream = io.BytesIO(done.stdout)
    return [np.load(stream, allow_pickle=False) for _ in range(len(Values._fields) + 1)]
