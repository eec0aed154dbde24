"""Shots: where the camera of a rendered video stands, picture by picture, and which moment each picture shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2 import camera, fileio
from d2.errors import InputError
from d2.recon import cameras, dataset, drawing
from d2.recon.gaussians import Gaussians4D
from d2.recon.sources import Source

ORBITS = ("turntable", "orbit-time", "bullet")
PATHS = (*ORBITS, "input")
DEFAULT_SIDE = 512  # pixels
MAX_SIDE, MAX_PICTURES = 8192, 100_000
SECONDS = 4.0  # of a turn
STILL = 0.5  # the moment at which time stands


@dataclass(frozen=True)
class Wishes:
    """What a user may ask of a shot; None: not asked for."""

    size: tuple[int, int] | None = None  # width, height in pixels
    fps: float | None = None
    seconds: float | None = None
    turns: int | None = None
    time: float | None = None
    elevation_deg: float | None = None
    fov_deg: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        checks = {
            "fps": (0.1, 1000), "seconds": (0.01, 3600), "turns": (-1000, 1000), "time": (0, 1),
            "elevation_deg": (-89, 89), "fov_deg": (1, 150),
        }  # fmt: skip
        for name, (low, high) in checks.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} must be in {low}..{high}, got {value!r}")
        if self.turns == 0:
            raise InputError("turns must not be 0; a negative number turns the other way")
        if self.size is not None and not all(16 <= side <= MAX_SIDE for side in self.size):
            raise InputError(f"size must be within 16..{MAX_SIDE} pixels a side, got {self.size}")


class Shot(NamedTuple):
    """n pictures."""

    name: str  # what its files are called
    c2w: np.ndarray  # [n, 4, 4] OpenGL camera to world
    Ks: np.ndarray  # [n, 3, 3] pixels
    width: int
    height: int
    times: np.ndarray  # [n] in 0..1
    fps: float

    def depth_range(self, gaussians: Gaussians4D) -> tuple[float, float]:
        """Nearest and farthest depth (world, along the optical axis) at which a camera sees the object."""
        center, radius = drawing.framing(gaussians)
        away = np.einsum("nj,nj->n", self.c2w[:, :3, 3] - center, self.c2w[:, :3, 2])
        return max(float(away.min()) - radius, 1e-3), max(float(away.max()) + radius, 2e-3)


def plan(path: str, source: Source, wishes: Wishes) -> Shot:
    """The shot that `path` names: one of PATHS, or a file with a camera path.

    turntable: one turn while time stands.  orbit-time: one turn while the clip plays, in whole loops.  bullet: the
    clip plays, time stands while the camera goes round, the clip plays on.  input: the input's own camera.  A file
    is nerfstudio's camera_path.json or a transforms.json.  The clip plays at its own speed whatever fps is.
    Raises InputError for a wish that means nothing there, and for a file that is no camera path.
    """
    if path in ORBITS:
        shot = _orbit(path, source, wishes)
    elif path == "input":
        _refuse(wishes, path, "seconds", "turns", "elevation_deg", "fov_deg")
        shot = _along(path, _input(source), source, wishes)
    elif Path(path).suffix == ".json" or Path(path).is_file():
        shot = _from_file(Path(path), source, wishes)
    else:
        raise InputError(f"--path {path!r}: expected {', '.join(PATHS)} or a .json file with a camera path")
    return shot


def clip_times(frames: int, clip_fps: float, fps: float, count: int) -> np.ndarray:  # [count] in 0..1
    """The moments at which pictures 0 … count - 1 at `fps` show a clip that plays again and again at its own speed."""
    frame = np.round(np.arange(count) * clip_fps / fps, 9) % frames
    return np.minimum(frame / max(frames - 1, 1), 1.0)


# -- around the object -----------------------------------------------------------------------------------


def _orbit(path: str, source: Source, wishes: Wishes) -> Shot:
    if path == "orbit-time":
        _refuse(wishes, path, "time")
    width, height = wishes.size or (DEFAULT_SIDE, DEFAULT_SIDE)
    fps, seconds, still = wishes.fps or source.fps, wishes.seconds or SECONDS, wishes.time
    still = STILL if still is None else still
    count = max(1, round(seconds * fps))  # pictures of the turn
    if path == "orbit-time":
        plays = max(1, round(seconds * source.fps / source.frames))
        count = max(1, round(plays * source.frames * fps / source.fps))
    if count > MAX_PICTURES:
        raise InputError(f"{count} pictures are more than {MAX_PICTURES}; lower --seconds or --fps")
    turn = 2 * np.pi * (wishes.turns or 1) * np.arange(count) / count
    if path == "turntable":
        azimuths, times = turn, np.full(count, still)
    elif path == "orbit-time":
        azimuths, times = turn, clip_times(source.frames, source.fps, fps, count)
    else:
        once = clip_times(source.frames, source.fps, fps, max(1, round(source.frames * fps / source.fps)))
        before, after = once[once < still - 1e-6], once[once > still + 1e-6]
        azimuths = np.concatenate([0 * before, turn, 0 * after])
        times = np.concatenate([before, np.full(count, still), after])
    elevation = math.radians(wishes.elevation_deg) if wishes.elevation_deg is not None else drawing.DEFAULT_ELEVATION
    fov = math.radians(wishes.fov_deg) if wishes.fov_deg is not None else drawing.DEFAULT_FOV
    center, radius = drawing.framing(source.gaussians)
    rig = drawing.orbit_rig(radius, azimuths, width, height, elevation, fov)
    Ks = np.tile(rig.K, (len(times), 1, 1))
    return Shot(path, drawing.around(rig, center), Ks, width, height, times, fps)


# -- cameras that are given ------------------------------------------------------------------------------


def _input(source: Source) -> cameras.Cameras:
    """The cameras of the input's own track, in order of time."""
    known = cameras.load(source.folder)
    track = known.input_track()
    arrays = {f.name: getattr(known, f.name)[track] for f in fields(known) if f.name not in ("width", "height")}
    return cameras.Cameras(**arrays, width=known.width, height=known.height)


def _along(name: str, track: cameras.Cameras, source: Source, wishes: Wishes) -> Shot:
    """One picture a camera at its own time; a camera that stands films the whole clip, at any rate."""
    stands = len(np.unique(track.views)) == 1
    c2w, Ks, times, fps = track.c2w, track.Ks, track.times, wishes.fps or source.fps
    if stands:
        count = max(1, round(source.frames * fps / source.fps))
        c2w, Ks = np.repeat(c2w[:1], count, 0), np.repeat(Ks[:1], count, 0)
        times = clip_times(source.frames, source.fps, fps, count)
    if wishes.time is not None:
        c2w, Ks, times = (c2w[:1], Ks[:1], times[:1]) if stands else (c2w, Ks, times)
        times = np.full(len(times), wishes.time)
    width, height = wishes.size or (track.width, track.height)
    return Shot(name, c2w, _fitted(Ks, track.width, track.height, width, height), width, height, times, fps)


def _fitted(Ks: np.ndarray, width: int, height: int, new_width: int, new_height: int) -> np.ndarray:
    """Intrinsics for another size: the whole of the old picture is seen, and more where the shape differs."""
    scale = min(new_width / width, new_height / height)
    fitted = Ks * np.array([scale, scale, 1.0])[:, None]
    fitted[:, 0, 2] += 0.5 * (new_width - scale * width)
    fitted[:, 1, 2] += 0.5 * (new_height - scale * height)
    return fitted


def _from_file(path: Path, source: Source, wishes: Wishes) -> Shot:
    _refuse(wishes, fileio.quoted(path), "seconds", "turns", "elevation_deg", "fov_deg")
    meta = fileio.read_json(path, fileio.TRANSFORMS_CAP)
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in path.stem).strip("-_") or "path"
    if not isinstance(meta, dict) or "camera_path" not in meta:
        return _along(name, cameras.read(path), source, wishes)
    label, entries = fileio.quoted(path), meta["camera_path"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{label}: camera_path must be a list of cameras")
    if str(meta.get("camera_type", "perspective")).lower() != "perspective":
        raise InputError(f"{label}: camera_type {meta['camera_type']!r} is not perspective")
    width, height = (round(_number(meta, f"render_{side}", label, 16, MAX_SIDE)) for side in ("width", "height"))
    fps = wishes.fps or (_number(meta, "fps", label, 0.1, 1000) if "fps" in meta else source.fps)
    poses, Ks = [], []
    for k, entry in enumerate(entries):
        poses.append(_pose(entry, k, path))
        fov = math.radians(_number(entry, "fov", f"{label}: camera {k}", 1, 170))  # vertical
        focal = camera.focal_length(fov, height)
        Ks.append(camera.intrinsics(focal, focal, width / 2, height / 2))
    times = _path_times(entries, label, source, fps) if wishes.time is None else np.full(len(entries), wishes.time)
    new_width, new_height = wishes.size or (width, height)
    fitted = _fitted(np.stack(Ks), width, height, new_width, new_height)
    return Shot(name, np.stack(poses), fitted, new_width, new_height, times, fps)


def _pose(entry: dict[str, Any], k: int, path: Path) -> np.ndarray:  # [4, 4]
    rows = entry.get("camera_to_world")
    if not isinstance(rows, list) or len(rows) != 16:
        raise InputError(f"{fileio.quoted(path)}: camera {k}: camera_to_world must be 16 numbers, row by row")
    return dataset.read_pose({"transform_matrix": [rows[i : i + 4] for i in range(0, 16, 4)]}, k, path)


def _path_times(entries: list[dict[str, Any]], label: str, source: Source, fps: float) -> np.ndarray:
    """Their own times (nerfstudio calls one render_time), or the clip as it plays."""
    key = next((key for key in ("time", "render_time") if key in entries[0]), None)
    if key is None:
        return clip_times(source.frames, source.fps, fps, len(entries))
    return np.array([_number(entry, key, f"{label}: camera {k}", 0, 1) for k, entry in enumerate(entries)])


def _number(entry: dict[str, Any], key: str, label: str, low: float, high: float) -> float:
    value = entry.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{label}: {key} must be a number in {low:g}..{high:g}, got {value!r}")
    return float(value)


def _refuse(wishes: Wishes, path: str, *names: str) -> None:
    for name in names:
        if getattr(wishes, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} means nothing with --path {path}; leave it out")
