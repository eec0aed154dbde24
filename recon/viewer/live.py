"""A reconstruction as it stands, finished or not: what the served page asks for every few seconds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from d2 import fileio
from d2.errors import ConflictError, D2Error, InputError
from d2.recon import checkpoint, metrics_log
from d2.recon.gaussians import Gaussians4D
from d2.recon.viewer import about, pack, page, reference
from d2.run import Run, is_run

MODEL, CONFIG = "gaussians.safetensors", "config.yaml"
DEFAULT_FPS, DEFAULT_FRAMES = 24.0, 25
FAR = {"az": 0.0, "el": 10.0, "radius": 3.7, "target": [0.0, 0.0, 0.0], "fov": 33.8}  # before anything is known


class Live:
    """Reads a reconstruction's folder each time it is asked; several threads may ask."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._packed: tuple[str, Gaussians4D, bytes] | None = None

    def page(self) -> bytes:
        """The viewer, which then asks for status and asset."""
        told = self._about() | {"live": True}
        return page.page(told["name"], told, None).encode()

    def status(self) -> dict[str, Any]:
        """How far the fit is; "version" names the model that `asset` would give, "" while there is none."""
        working = self._working()
        records = metrics_log.records(working)
        iteration = records[-1]["iteration"] if records else 0
        total = self._iterations(working)
        packed = self._newest(working)
        done = working == self.folder and (working / MODEL).is_file()
        progress = [["Progress", f"{iteration} of {total} iterations" if total else f"{iteration} iterations"]]
        told = self._about()
        facts = told["facts"] if packed else []
        return {
            "version": packed[0] if packed else "",
            "done": done,
            "message": f"Fitting: {iteration} iterations; the first model comes with the first validation",
            "facts": facts if done else progress + facts,
            "curve": metrics_log.curve(working),
            "credits": told["credits"],
        }

    def asset(self) -> bytes | None:
        """The newest model, packed; None while there is none."""
        packed = self._newest(self._working())
        return packed[2] if packed else None

    def _working(self) -> Path:
        """Where the fit writes: beside the old result while that is being replaced."""
        new = fileio.sibling(self.folder, ".new")
        return new if (new / CONFIG).is_file() else self.folder

    def _newest(self, working: Path) -> tuple[str, Gaussians4D, bytes] | None:
        """Version, model and its packed form; the last good one where files change while they are read."""
        with self._lock:
            try:
                file = next((f for f in (working / MODEL, *reversed(checkpoint.checkpoints(working / "ckpt")))
                             if f.is_file()), None)  # fmt: skip
                version = f"{file.name}-{file.stat().st_mtime_ns}" if file else ""
                if file and (self._packed is None or self._packed[0] != version):
                    gaussians = _model(file)
                    self._packed = version, gaussians, pack.pack(gaussians, min(1, gaussians.sh_degree))
            except (D2Error, OSError):
                pass
            return self._packed

    def _about(self) -> dict[str, Any]:
        run = _run_of(self.folder)
        name = self.folder.absolute().parent.parent.name or "asset"
        working = self._working()
        sheets = reference.load(working)
        frames = len(sheets["input"].times) if sheets else DEFAULT_FRAMES
        fps = run.fps if run else DEFAULT_FPS
        packed = self._newest(working)
        if packed:
            return about.about(packed[1], name, fps, frames, working, run)
        home = sheets["input"].poses[0] if sheets else FAR
        return about.without_model(name, fps, frames, home)

    def _iterations(self, working: Path) -> int | None:
        try:
            config = fileio.read_yaml(working / CONFIG)
        except InputError:
            return None
        total = config.get("iterations") if isinstance(config, dict) else None
        return total if isinstance(total, int) else None


def find(path: str | Path) -> Path:
    """The folder of the reconstruction that a run folder, that folder or its model names, begun or finished.

    Raises ConflictError for a run in which none was begun, InputError for anything else.
    """
    path = Path(path)
    label = fileio.quoted(path)
    folder = path.parent if path.is_file() and path.name == MODEL else path
    if (folder / CONFIG).is_file() or (folder / MODEL).is_file():
        return folder
    begun = {_final(config.parent): config.stat().st_mtime for config in folder.glob(f"recon/*/{CONFIG}")}
    if begun:
        return max(begun, key=lambda found: begun[found])
    if is_run(folder):
        raise ConflictError(f"{label} has no reconstruction yet; run: d2 reconstruct {label}")
    raise InputError(f"{label} is neither a run folder nor a reconstruction: no run.json, no {MODEL}")


def _final(folder: Path) -> Path:
    """The folder that one called .<name>.new will become."""
    name = folder.name
    return folder.with_name(name[1:-4]) if name.startswith(".") and name.endswith(".new") else folder


def _model(file: Path) -> Gaussians4D:
    if file.name == MODEL:
        return Gaussians4D.load(file)
    return checkpoint.load(file, "cpu")[0].gaussians.map(lambda tensor: tensor.detach())


def _run_of(folder: Path) -> Run | None:
    root = folder.absolute().parent.parent
    return Run.open(root) if is_run(root) else None
