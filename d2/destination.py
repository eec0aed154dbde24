"""Whether a result can be put where it is to go: room, permission, and folders that nothing can take the place of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from d2.errors import InputError, ResourceError
from d2.fileio import MB, quoted


def require_space(folder: str | Path, needed: int) -> None:
    """Raises InputError unless `folder` is or can become a writable folder, ResourceError unless `needed` bytes
    are free there."""
    try:
        existing = Path(folder).absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"{quoted(folder)} cannot be a folder: {quoted(existing)} is a file")
        if not is_writable(existing):
            raise InputError(f"{quoted(folder)}: permission denied to write in {quoted(existing)}")
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise InputError(f"cannot use {quoted(folder)}: {(error.strerror or str(error)).lower()}") from error
    if free < needed:
        raise ResourceError(f"{folder}: {needed / MB:.0f} MB of disk needed, {free / MB:.0f} MB free")


def is_writable(folder: str | Path) -> bool:
    """Whether files can be created in an existing folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def require_replaceable(folder: str | Path) -> None:
    """Raises InputError where no other folder can be renamed to an existing one: a mount point, or where we stand."""
    real = Path(os.path.realpath(folder))
    if os.path.ismount(real):
        raise InputError(f"{quoted(folder)} is a mount point, which cannot be replaced; choose a folder in it")
    if Path(os.path.realpath(".")).is_relative_to(real):
        raise InputError(
            f"{quoted(folder)} is the folder you are in, which cannot be replaced; call d2 from another folder"
        )
