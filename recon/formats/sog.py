"""SOG: one moment as PlayCanvas's compressed splats, through its own converter splat-transform where node is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from d2 import fileio
from d2.errors import ResourceError, SetupError
from d2.recon.formats import ply
from d2.recon.gaussians import Gaussians3D

TIMEOUT = 600.0  # seconds for one moment


def encode(gaussians: Gaussians3D, layout: ply.Layout) -> bytes:
    """One moment, in the axes of `layout`. Raises SetupError without splat-transform, ResourceError when it fails."""
    with tempfile.TemporaryDirectory(prefix="d2-sog-") as folder:
        given, made = Path(folder) / "a.ply", Path(folder) / "a.sog"
        fileio.atomic_write(given, ply.encode(gaussians, layout))
        call = [*command(), "-q", "-w", "-g", "cpu", str(given), str(made)]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ResourceError(f"splat-transform did not finish: {error}") from error
        if done.returncode or not made.is_file():
            words = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise ResourceError(f"splat-transform failed: {words[-1][:300]}")
        return made.read_bytes()


def command() -> list[str]:
    """How to call splat-transform: $D2_SPLAT_TRANSFORM, else as installed. SetupError says how to get it."""
    named = os.environ.get("D2_SPLAT_TRANSFORM") or shutil.which("splat-transform")
    if not named:
        raise SetupError("SOG needs node and splat-transform; run: npm install -g @playcanvas/splat-transform")
    return ["node", named] if named.endswith((".js", ".mjs")) else [named]
