"""Where outputs go, checked before anything is written: a folder that can be written to, names that are free."""

from __future__ import annotations

import os
import re
from pathlib import Path

from d2 import fileio
from d2.errors import ConflictError, InputError
from d2.recon.formats import sequence


def folder(
    out: str | Path | None,
    home: Path | None,  # of the reconstruction; None: Gaussians in memory
    below: str,  # its folder for such outputs
) -> Path:
    """The folder to write into: `out`, or `below` the reconstruction. Raises InputError unless it is or can be one."""
    if out is None and home is None:
        raise InputError("Gaussians in memory have no folder of their own; pass out=…")
    if out is not None and str(out) in ("", "-"):
        raise InputError(f"--out must be a folder, got {str(out)!r}")
    chosen = Path(out) if out is not None else Path(home or ".") / below
    existing = chosen.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{fileio.quoted(existing)} is a file; outputs go into a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{fileio.quoted(existing)} cannot be written to; choose another --out")
    return chosen


def remove_leftovers(target: Path) -> None:
    """Removes what a process left that was killed while it wrote `target`: files under a name that only d2 gives."""
    name = re.compile(rf"\.{re.escape(target.stem[:40])}\.[a-z0-9_]{{8}}{re.escape(target.suffix)}")
    for path in list(target.parent.glob(".*")):
        if name.fullmatch(path.name) and path.is_file():
            fileio.remove(path)


def check_free(target: Path, overwrite: bool) -> None:
    """Raises unless `target`, a file, or a sequence's folder where it has no suffix, may be put there."""
    if target.suffix == "":
        sequence.check_replaceable(target, overwrite)
    elif target.is_dir():
        raise InputError(f"{fileio.quoted(target)} is a folder; choose another --out")
    elif os.path.lexists(target) and not overwrite:
        raise ConflictError(f"{fileio.quoted(target)} exists; pass --overwrite or choose another --out")
