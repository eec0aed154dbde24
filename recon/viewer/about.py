"""What the page tells about an asset: how it plays, where to look from, where it comes from, how good it is."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np

from d2 import __version__, images
from d2.recon import drawing, metrics_log
from d2.recon.gaussians import Gaussians4D
from d2.recon.viewer import reference
from d2.run import Run

POSTER_SIZE = 480  # pixels
SIDES = {"Front": 0.0, "Right": 90.0, "Back": 180.0, "Left": 270.0}  # azimuth in degrees
AIR = 1.04  # room around what just fits
TOP = 89.0  # degrees of elevation


def about(
    gaussians: Gaussians4D,
    name: str,
    fps: float,
    frames: int,
    folder: Path | None = None,  # of the reconstruction, for its reference pictures and its metrics
    run: Run | None = None,
) -> dict[str, Any]:
    """What main.js reads, see its typedef About."""
    sheets = reference.load(folder) if folder else {}
    source = sheets["input"].poses[0] if "input" in sheets else None
    home = _home(gaussians, source)
    told: dict[str, Any] = {
        "name": name,
        "clip": _clip(fps, frames),
        "home": home,
        "views": _views(gaussians, home, source),
        "facts": facts(len(gaussians), fps, frames, _record(folder, run)),
        "credits": _credits(run),
        "curve": metrics_log.curve(folder) if folder else [],
        "live": False,
    }
    for key, name_of_sheet in (("input", "input"), ("pictures", "views")):
        if name_of_sheet in sheets:
            told[key] = _shown(sheets[name_of_sheet])
    return told


def without_model(name: str, fps: float, frames: int, home: dict[str, Any]) -> dict[str, Any]:
    """The same before the first model exists; `home` is where to look from."""
    return {
        "name": name, "clip": _clip(fps, frames), "home": home, "views": {}, "facts": [], "credits": "", "curve": [],
        "live": False,
    }  # fmt: skip


def poster(gaussians: Gaussians4D, home: dict[str, Any]) -> str:
    """The first moment from the first place, as the address of a small transparent picture."""
    rig = drawing.orbit_rig(1.0, np.array([math.radians(home["az"])]), POSTER_SIZE, POSTER_SIZE,
                           math.radians(home["el"]), math.radians(home["fov"]))  # fmt: skip
    c2w = rig.c2w
    c2w[:, :3, 3] = np.asarray(home["target"]) + c2w[:, :3, 2] * home["radius"]
    (picture,) = drawing.render_views(gaussians, c2w, rig.K, POSTER_SIZE, POSTER_SIZE, [0.0])
    return _address(reference.webp(images.to_uint8(picture)))


def facts(gaussians: int, fps: float, frames: int, record: dict[str, Any]) -> list[list[str]]:
    """Label and value, as shown."""
    told = [["Gaussians", f"{gaussians:,}".replace(",", "\u202f")]]
    if frames > 1:
        told.append(["Clip", f"{frames} frames at {fps:g} a second"])
    if isinstance(record.get("psnr"), int | float):
        told.append(["Quality", f"{record['psnr']:.1f} dB (held-out PSNR)"])
    if isinstance(record.get("iterations"), int):
        told.append(["Fitted in", f"{record['iterations']} iterations"])
    return [*told, ["Made with", f"d2 {__version__}"]]


def _clip(fps: float, frames: int) -> dict[str, Any]:
    return {"seconds": max(frames - 1, 1) / fps, "frames": frames}


def _home(gaussians: Gaussians4D, source: dict[str, Any] | None) -> dict[str, Any]:
    """From the front, so far away that the whole object is seen at every moment."""
    elevation = math.radians(source["el"]) if source else drawing.DEFAULT_ELEVATION
    return _fitted(gaussians, drawing.framing(gaussians).center, elevation)


def _fitted(gaussians: Gaussians4D, center: np.ndarray, elevation: float) -> dict[str, Any]:
    """A pose at azimuth 0; "tall" and "wide" let the page come closer where its window allows."""
    above, below, beside = drawing.fitting_distances(gaussians, center, elevation)
    tall, wide = AIR * max(above, below), AIR * beside
    return {
        "az": 0.0, "el": math.degrees(elevation), "radius": max(tall, wide), "target": center.tolist(),
        "fov": math.degrees(drawing.DEFAULT_FOV), "tall": tall, "wide": wide,
    }  # fmt: skip


def _views(gaussians: Gaussians4D, home: dict[str, Any], source: dict[str, Any] | None) -> dict[str, Any]:
    views = {"Source camera": source} if source else {}
    views |= {name: home | {"az": azimuth} for name, azimuth in SIDES.items()}
    return views | {"Top": _fitted(gaussians, np.asarray(home["target"]), math.radians(TOP))}


def _record(folder: Path | None, run: Run | None) -> dict[str, Any]:
    return (run.stage(f"reconstruct:{folder.name}") if run and folder else None) or {}


def _credits(run: Run | None) -> str:
    """What was put in, and which models under which licence made the pictures."""
    stage = (run.stage("generate") if run else None) or {}
    lines = []
    given = stage.get("input")
    if isinstance(given, dict) and isinstance(given.get("name"), str):
        lines.append(f"From {given['name']}")
    models = stage.get("models")
    for model, record in models.items() if isinstance(models, dict) else ():
        if isinstance(record, dict):
            origin = ", ".join(str(record[key]) for key in ("source", "licence") if record.get(key))
            lines.append(f"{model}: {origin or 'source and licence unknown'}")
    return "\n".join(lines)


def _shown(sheet: reference.Sheet) -> dict[str, Any]:
    return {
        "src": _address(sheet.webp), "columns": sheet.columns, "width": sheet.width, "height": sheet.height,
        "poses": sheet.poses, "times": sheet.times,
    }  # fmt: skip


def _address(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
