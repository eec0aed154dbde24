"""Alembic meshes, by Blender: no Python package writes them, so our USD goes through it in a process of its own.

Blender is $D2_BLENDER (the program, or a Python that has the package bpy), the program `blender`, or bpy beside us.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from d2 import fileio
from d2.errors import SetupError
from d2.recon.formats import in_blender, mesh_usd
from d2.recon.mesh import Mesh

VARIABLE = "D2_BLENDER"
TIMEOUT = 1800  # seconds


def write(
    meshes: Sequence[Mesh],  # [F], right up back
    path: str | Path,
    fps: float,
    name: str = "asset",
) -> None:
    """Writes the clip with its velocities, y up as is Alembic's custom, whole or not at all; colours are left out.

    Raises SetupError without Blender or where it fails.
    """
    call = command()
    with fileio.atomic_path(path) as temporary:
        source = temporary.with_name(f"{temporary.stem}.usd")
        try:
            mesh_usd.write(meshes, source, fps, name=name)
            words = [str(source), str(temporary), str(len(meshes)), repr(fps)]
            done = subprocess.run([*call, *words], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SetupError(f"{call[0]} cannot be run as Blender: {error}") from error
        finally:
            fileio.remove(source)
        if done.returncode or not temporary.stat().st_size:
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise SetupError(f"Blender ({call[0]}) wrote no Alembic: {lines[-1][:300]}")


def command() -> list[str]:
    """The words that run `in_blender` there, up to its own. Raises SetupError where there is no Blender."""
    script = str(Path(in_blender.__file__))
    named = os.environ.get(VARIABLE)
    program = shutil.which(named) if named else shutil.which("blender")
    if named and program is None:
        raise SetupError(f"{VARIABLE}={named} is no program; name Blender, or a Python that has bpy")
    if program is None and importlib.util.find_spec("bpy"):
        program = sys.executable
    if program is None:
        raise SetupError(
            "Alembic needs Blender; install it, or run: python3.11 -m venv blender && blender/bin/pip install bpy; "
            f"and set {VARIABLE}=blender/bin/python"
        )
    if "python" in Path(program).name:
        return [program, script]
    return [program, "--background", "--factory-startup", "--python-exit-code", "1", "--python", script, "--"]
