"""Run: the run folder, its manifest, lock and stages; a stage is done when the manifest says so, written last."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from d2 import __version__, destination, fileio, images
from d2.camera import Rig
from d2.errors import ConflictError, InputError
from d2.matrix import ImageMatrix, cell_path

MANIFEST = "run.json"
TRANSFORMS = "transforms.json"
LOCK = ".lock"
VERSION = 1
MAX_CELLS = 100_000  # images of a matrix, far above any model
LEFTOVER = re.compile(r"\.[^.].*\.[a-z0-9_]{8}(\.\w+)?")  # what fileio calls a file before it has its name


class Run:
    """A folder with run.json; the only writer in it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def create(cls, folder: str | Path, fps: float = 24.0) -> Self:
        """An empty run; raises ConflictError when the folder holds something already."""
        cls.require_free(folder)
        folder = Path(folder)
        run = cls(folder, {"version": VERSION, "d2": __version__, "fps": fps, "stages": {}})
        run._commit()
        return run

    @staticmethod
    def require_free(folder: str | Path) -> None:
        """Raises unless a new run can be created at `folder`: absent, or an empty folder."""
        folder = Path(folder)
        destination.require_space(folder, 0)
        # Temporary files of a process that died before its first commit start with a dot.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConflictError(f"{fileio.quoted(folder)} is not empty and no run; choose another --out")

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads run.json; raises InputError for a damaged one or one of a newer d2."""
        folder = Path(folder)
        manifest = fileio.read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
            raise InputError(f"{fileio.quoted(folder / MANIFEST)} is not a run manifest")
        version = manifest.get("version")
        if version != VERSION or isinstance(version, bool):
            raise InputError(
                f"{fileio.quoted(folder)} has run format {version!r}, written by d2 {manifest.get('d2')!r}; this d2"
                f" {__version__} reads format {VERSION}: use the d2 that wrote it"
            )
        fps = manifest.get("fps")
        if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= 1000:
            raise InputError(f"{fileio.quoted(folder / MANIFEST)}: fps must be in 0..1000, got {fps!r}")
        for name, stage in manifest["stages"].items():
            if not isinstance(stage, dict):
                raise InputError(f"{fileio.quoted(folder / MANIFEST)}: stage {name!r} must be an object")
            _check_files(folder, name, stage)
        if "generate" in manifest["stages"]:
            _check_matrix(folder, manifest["stages"]["generate"])
        return cls(folder, manifest)

    @property
    def fps(self) -> float:
        """Frames a second at which the asset plays."""
        return float(self.manifest["fps"])

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a stage recorded when it was committed, or None."""
        return self.manifest["stages"].get(name)

    def commit_stage(self, name: str, record: dict[str, Any]) -> None:
        """Marks a stage done; its files must all be on disk already."""
        self.manifest["stages"][name] = record
        self._commit()

    def drop_stage(self, name: str) -> None:
        """Marks a stage not done (before its files are replaced)."""
        if self.manifest["stages"].pop(name, None) is not None:
            self._commit()

    def write_matrix(
        self,
        cell: Callable[[int, int], np.ndarray],
        frames: int,
        rig: Rig,
        record: dict[str, Any],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Commits the generate stage: `cell(v, f)` gives uint8 [H, W, 3 or 4]; images, cameras, then done.

        `finish` is called between images and cameras, to write what is made from all images.
        """
        views = len(rig.azimuth)
        self.drop_stage("generate")
        digests = {}
        for v in range(views):
            for f in range(frames):
                path = self.folder / cell_path(v, f)
                images.write_png(path, cell(v, f))
                digests[cell_path(v, f)] = fileio.sha256(path)
        finish()
        fileio.write_json(self.folder / TRANSFORMS, transforms(rig, frames))
        self.commit_stage("generate", record | {"views": views, "frames": frames, "files": digests})

    def write_pictures(
        self,
        stage: str,
        splits: dict[str, list[dict[str, Any]]],  # transforms file -> its frames, each with a file_path ending in .png
        picture: Callable[[str, int], np.ndarray],  # transforms file, frame -> uint8 [H, W, 3 or 4]
        record: dict[str, Any],
    ) -> None:
        """Commits pictures with cameras of any kind: images, then the transforms files, then done."""
        self.drop_stage(stage)
        digests = {}
        for name, frames in splits.items():
            for k, entry in enumerate(frames):
                path = fileio.inside(self.folder, entry["file_path"])
                images.write_png(path, picture(name, k))
                digests[entry["file_path"]] = fileio.sha256(path)
        for name, frames in splits.items():
            layout = {"camera_model": "OPENCV", "orientation_override": "none", "frames": frames}
            fileio.write_json(self.folder / name, layout)
        self.commit_stage(stage, record | {"files": digests})

    def matrix(self) -> ImageMatrix:
        """The images of a finished generate stage. Raises ConflictError when there is none."""
        stage = self.stage("generate")
        if stage is None:
            raise ConflictError(f"{fileio.quoted(self.folder)} has no finished matrix; run d2 generate --resume first")
        return ImageMatrix(self.folder, stage["views"], stage["frames"], stage.get("files"))

    def require_intact(self, name: str) -> None:
        """Raises InputError naming the first file of a stage that is gone or is not what the stage recorded."""
        for relative, digest in (self.stage(name) or {}).get("files", {}).items():
            path = fileio.inside(self.folder, relative)
            shut = os.path.isdir(path.parent) and not os.access(path.parent, os.X_OK)  # then it may well be there
            if not os.path.isfile(path) and not shut:  # pathlib's raises for names that are too long
                raise InputError(f"{fileio.quoted(path)} is missing; restore it or repeat the {name} stage")
            if fileio.sha256(path) != digest:
                raise InputError(
                    f"{fileio.quoted(path)} changed since it was made (sha256 differs from run.json); restore it or"
                    f" repeat the {name} stage"
                )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one process; a dead owner's lock is taken over. Raises ConflictError."""
        path = self.folder / LOCK
        mine = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}
        while not fileio.create_exclusive(path, json.dumps(mine).encode()):
            owner = _lock_owner(path)
            if owner is not None and _alive(owner):
                where = f"pid {owner.get('pid')} on {owner.get('host')}"
                raise ConflictError(f"{fileio.quoted(self.folder)} is locked by {where}")
            fileio.remove(path)
        try:
            self.manifest = type(self).open(self.folder).manifest  # another process may have committed meanwhile
            yield
        finally:
            fileio.remove(path)

    def remove_leftovers(self) -> None:
        """Removes temporary files that a killed process left beside the files of a stage; call it under the lock."""
        for pattern in (
            ".*",
            "generate/**/.*",
            "images/**/.*",
            "recon/*/.*",
            "recon/*/ckpt/.*",
            "recon/*/reference/.*",
        ):
            for path in list(self.folder.glob(pattern)):
                if LEFTOVER.fullmatch(path.name) and path.is_file():
                    fileio.remove(path)

    def _commit(self) -> None:
        fileio.write_json(self.folder / MANIFEST, self.manifest)


def transforms(rig: Rig, frames: int) -> dict[str, Any]:
    """The content of transforms.json: nerfstudio's layout plus time, view and frame of every image."""
    c2w = rig.c2w
    return {
        "camera_model": "OPENCV",
        "orientation_override": "none",
        "w": rig.width,
        "h": rig.height,
        "fl_x": rig.focal,
        "fl_y": rig.focal,
        "cx": rig.width / 2,
        "cy": rig.height / 2,
        "frames": [
            {
                "file_path": cell_path(v, f),
                "transform_matrix": c2w[v].tolist(),
                "time": frame_time(f, frames),
                "view": v,
                "frame": f,
            }
            for v in range(len(c2w))
            for f in range(frames)
        ],
    }


def frame_time(frame: int, frames: int) -> float:
    """Time of a frame in 0..1: the first at 0, the last at 1."""
    return frame / (frames - 1) if frames > 1 else 0.0


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run manifest."""
    return os.path.isfile(Path(folder) / MANIFEST)  # pathlib's raises for names that are too long


def _lock_owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None when the file is gone or was never finished."""
    try:
        owner = fileio.read_json(path, cap=4096)
    except InputError:
        return None
    return owner if isinstance(owner, dict) else None


def _alive(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname():
        return True  # cannot be asked from here
    pid = owner.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(pid) == owner.get("started")  # else a new process has the number of the dead one


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _check_files(folder: Path, name: str, stage: dict[str, Any]) -> None:
    files = stage.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise InputError(f"{fileio.quoted(folder / MANIFEST)}: files of stage {name!r} must map paths to sha256")
    for relative in files:
        fileio.inside(folder, relative)


def _check_matrix(folder: Path, stage: dict[str, Any]) -> None:
    for key in ("views", "frames"):
        value = stage.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_CELLS:
            raise InputError(f"{fileio.quoted(folder / MANIFEST)}: {key} must be in 1..{MAX_CELLS}, got {value!r}")
    if stage["views"] * stage["frames"] > MAX_CELLS:
        raise InputError(f"{fileio.quoted(folder / MANIFEST)}: more than {MAX_CELLS} images")
