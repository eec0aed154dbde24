"""From one splat file to another, and what is in a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from d2 import fileio
from d2.errors import ConflictError, InputError
from d2.recon.formats import glb, ply, splat, spz, usd, usd_reader
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.sources import DEFAULT_FPS, GAUSSIANS, find

USD = (".usd", ".usda", ".usdc", ".usdz")
READERS = {".ply": ply.read, ".spz": spz.read, ".splat": splat.read, ".glb": glb.read}
READERS |= dict.fromkeys(USD, usd_reader.read)
SOURCES = (".ply", ".spz", ".splat")
TARGETS = (".ply", ".spz", ".splat", ".glb", *USD)


def convert(source: str | Path, target: str | Path, overwrite: bool = False) -> None:
    """Writes the Gaussians of a .ply, .spz or .splat as .ply, .spz, .splat, .glb or .usd, axes as is the custom.

    Raises InputError for other suffixes and unreadable files, ConflictError for a target that exists.
    """
    source, target = Path(source), Path(target)
    if source.suffix.lower() not in SOURCES:
        raise InputError(f"cannot convert {fileio.quoted(source)}: expected one of {', '.join(SOURCES)}")
    suffix = target.suffix.lower()
    if suffix not in TARGETS or target.is_dir():
        raise InputError(f"cannot convert to {fileio.quoted(target)}: expected a file {', '.join(TARGETS)}")
    if os.path.lexists(target) and not overwrite:
        raise ConflictError(f"{fileio.quoted(target)} exists; pass --overwrite or choose another name")
    gaussians = READERS[source.suffix.lower()](source)
    match suffix:
        case ".ply":
            ply.write(gaussians, target)
        case ".spz":
            spz.write(gaussians, target)
        case ".splat":
            splat.write(gaussians, target)
        case ".glb":
            glb.write(gaussians, target)
        case _:
            usd.write(Gaussians4D.still(gaussians), target, [0.0], DEFAULT_FPS, name=target.stem)


def describe(path: str | Path) -> dict[str, Any]:
    """Counts, bounds (metres in our world, z up), degree, duration in seconds (0 for a still) and size in bytes.

    `path` is a splat file, a gaussians.safetensors, or a folder that holds one.  Raises InputError.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir() or path.name == GAUSSIANS or suffix == ".safetensors":
        found = find(path)
        moment, seconds = found.gaussians.at(0.5), found.frames / found.fps
        timing = {"frames": found.frames, "fps": found.fps}
        path = (found.folder or path) / GAUSSIANS if path.is_dir() else path
    elif suffix in READERS:
        moment, frames, fps = usd_reader.read_clip(path) if suffix in USD else (READERS[suffix](path), 1, DEFAULT_FPS)
        seconds = frames / fps if frames > 1 else 0.0
        timing = {"frames": frames, "fps": fps} if frames > 1 else {"frames": 1}
    else:
        raise InputError(f"{fileio.quoted(path)}: expected a run or one of {', '.join([*READERS, '.safetensors'])}")
    return {"file": str(path), "bytes": path.stat().st_size, **_contents(moment), **timing, "seconds": seconds}


def _contents(gaussians: Gaussians3D) -> dict[str, Any]:
    means = gaussians.means
    return {
        "gaussians": len(gaussians),
        "sh_degree": gaussians.sh_degree,
        "low": [round(float(x), 6) for x in means.amin(0)],
        "high": [round(float(x), 6) for x in means.amax(0)],
    }
