"""One video for each view: SV4D's and SV4D 2.0's outputs, Consistent4D's folders, and videos with a camera file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2 import camera, fileio, images, inputs
from d2.errors import InputError
from d2.recon.importers.pictures import Matrix, Picture

CAMERAS = "cameras.json"
SV4D_VIEW = re.compile(r"(\d{6})_(v\d{3}|process_input|t000)\.mp4")  # t000: all views at once, by SV4D only
# Azimuths from the input view, degrees, in the order input, v001, v002, ...
SV4D = tuple(360 * k / 21 for k in (0, 2, 5, 7, 9, 12, 14, 16, 19))
SV4D2 = {5: (0, 60, 120, 180, 240), 9: (0, 30, 75, 120, 165, 210, 255, 300, 330)}
SV4D_ELEVATION = {"sv4d": 10.0, "sv4d2": 0.0}
SV4D_LICENCE = "Stability AI Community License"
CONSISTENT4D = {"eval_0": -75.0, "eval_1": 15.0, "eval_2": 105.0, "eval_3": 195.0}  # degrees from the input view
CONSISTENT4D_FOV, CONSISTENT4D_RADIUS = 49.1, 2.0
INPUTS = ("input", "ref", "reference", ".")  # where Consistent4D's input frames may lie
MOST_VIEWS = 1000


def sv4d(path: Path, elevation_deg: float | None, fov_deg: float | None, clockwise: bool) -> Matrix:
    """The videos 000000_v001.mp4 … of one sample; `path` is their folder, or one of them where it holds several.

    SV4D 2.0 and SV4D write their input as process_input, early versions of SV4D as v000; what tells SV4D is t000, the
    views of its first moment.  The azimuths are those of their sampling scripts, the elevation is by default the
    scripts' (10° and 0°), field of view and turning direction are SV3D's.  An input longer than its views is cut.
    """
    videos = _sv4d_videos(path)
    is_first = not videos.keys().isdisjoint({"t000", "v000"})
    given = videos.get("v000", videos.get("process_input"))
    if given is None:
        raise InputError(f"{fileio.quoted(path)}: the input's video is missing: NNNNNN_process_input.mp4 or _v000.mp4")
    files = [given, *(videos[name] for name in sorted(videos) if name not in ("v000", "process_input", "t000"))]
    azimuths = SV4D if is_first else SV4D2.get(len(files), ())
    if len(files) != len(azimuths):
        wanted = "9 (SV4D)" if is_first else "5 or 9 (SV4D 2.0)"
        raise InputError(f"{fileio.quoted(path)}: expected {wanted} videos of one sample, got {len(files)}")
    name = "sv4d" if is_first else "sv4d2"
    elevation = SV4D_ELEVATION[name] if elevation_deg is None else elevation_deg
    cameras = _orbit(azimuths, elevation, camera.DEFAULT_RADIUS, clockwise)
    models = {"models": {name: {"source": "stabilityai/sv4d", "licence": SV4D_LICENCE}}}
    return _matrix(files, cameras, fov_deg or camera.DEFAULT_FOV_DEG, models, cut_input=True)


def consistent4d(folder: Path, elevation_deg: float | None, fov_deg: float | None, clockwise: bool) -> Matrix:
    """A test object of Consistent4D: eval_0 … eval_3 at -75, 15, 105 and 195° from its input, which may lie there too.

    Elevation 0, distance 2 and field of view 49.1° are those of its configuration.  Its repository does not name the
    azimuths: they are those of its four cameras a quarter turn apart, to be checked against your data.
    """
    files = [folder / name for name in CONSISTENT4D if (folder / name).is_dir()]
    azimuths = [CONSISTENT4D[file.name] for file in files]
    given = next((folder / name for name in INPUTS if _has_images(folder / name)), None)
    if given is not None:
        files, azimuths = [given, *files], [0.0, *azimuths]
    if len(files) < 2:
        hint = "; a clip of one view is an input of d2 generate" if given is not None else ""
        raise InputError(f"{fileio.quoted(folder)}: expected folders {', '.join(CONSISTENT4D)} of frames{hint}")
    cameras = _orbit(azimuths, elevation_deg or 0.0, CONSISTENT4D_RADIUS, clockwise)
    return _matrix(files, cameras, fov_deg or CONSISTENT4D_FOV, {}, input_first=given is not None)


def with_cameras(folder: Path) -> Matrix:
    """Videos, or folders of frames, that cameras.json names:

    {"fps": 24, "fov_deg": 33.8, "radius": 3.7, "cameras": [{"file": "front.mp4", "azimuth_deg": 0, "elevation_deg":
    10}, {"file": "left", "transform_matrix": [...], "fl_x": 900, "fl_y": 900, "cx": 288, "cy": 288}]}

    A camera stands on the orbit (azimuth from the front, counter-clockwise from above) or where its matrix (camera to
    world, OpenGL, 4×4 or 3×4) says; fov_deg, horizontal, or fl_x … in pixels, its own before the file's.
    """
    path = folder / CAMERAS
    meta = fileio.read_json(path)
    entries = meta.get("cameras") if isinstance(meta, dict) else None
    if not isinstance(entries, list) or not 2 <= len(entries) <= MOST_VIEWS:
        raise InputError(f"{fileio.quoted(path)}: expected a list of 2 to {MOST_VIEWS} cameras")
    known = {
        "file",
        "azimuth_deg",
        "elevation_deg",
        "radius",
        "fov_deg",
        "transform_matrix",
        "fl_x",
        "fl_y",
        "cx",
        "cy",
    }
    rows, fps = [], _number(meta, {}, "fps", f"{fileio.quoted(path)}", 1e-3, 1000)
    for k, entry in enumerate(entries):
        where = f"{fileio.quoted(path)}: camera {k}"
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise InputError(f"{where}: expected an object with a file")
        unknown = entry.keys() - known
        if unknown:
            raise InputError(f"{where}: unknown field {min(unknown)!r}; known: {', '.join(sorted(known))}")
        file = fileio.inside(folder, entry["file"])
        pictures, rate = _read(file)
        fps = fps or rate
        c2w = _pose(entry, meta, where)
        K = _intrinsics(entry, meta, pictures[0].size, where)
        rows.append([_picture(picture, c2w, K) for picture in pictures])
    _require_equal([entry["file"] for entry in entries], rows, folder)
    return Matrix(rows, fps)


def _matrix(
    files: Sequence[Path],
    cameras: np.ndarray,  # [V, 4, 4]
    fov_deg: float,
    record: dict[str, Any],
    input_first: bool = True,
    cut_input: bool = False,  # to the frames of the views
) -> Matrix:
    rows, fps = [], None
    for file, c2w in zip(files, cameras, strict=True):
        pictures, rate = _read(file)
        fps = fps or rate
        width, height = pictures[0].size
        focal = camera.focal_length(np.radians(fov_deg), width)
        K = camera.intrinsics(focal, focal, width / 2, height / 2)
        rows.append([_picture(picture, c2w, K) for picture in pictures])
    if cut_input:
        rows[0] = rows[0][: len(rows[1])]
    _require_equal([file.name for file in files], rows, files[0].parent)
    return Matrix([*rows[1:], rows[0]] if input_first else rows, fps, record)


def _sv4d_videos(path: Path) -> dict[str, Path]:
    """v001 … -> file, of one sample."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        match = SV4D_VIEW.fullmatch(file.name)
        if match:
            found.setdefault(match[1], {})[match[2]] = file
    if not path.is_dir():
        match = SV4D_VIEW.fullmatch(path.name)
        found = {match[1]: found[match[1]]} if match else {}
    if not found:
        raise InputError(f"{fileio.quoted(path)} holds no videos called 000000_v001.mp4 as SV4D writes them")
    if len(found) > 1:
        names = ", ".join(sorted(found)[:5])
        raise InputError(
            f"{fileio.quoted(path)} holds {len(found)} samples ({names}); name one video of the one you mean"
        )
    return next(iter(found.values()))


def _read(file: Path) -> tuple[list[Image.Image], float | None]:
    """Frames of a video or of a folder, and the rate where it is known."""
    if file.is_dir():
        names = [path for path in file.iterdir() if path.suffix.lower() in images.SUFFIXES and path.is_file()]
        if not names:
            raise InputError(f"{fileio.quoted(file)} holds no images")
        return [images.open_image(path) for path in inputs.natural_order(names, file)], None
    if not file.is_file():
        raise InputError(f"{fileio.quoted(file)} does not exist")
    return inputs.read_video(file)


def _picture(picture: Image.Image, c2w: np.ndarray, K: np.ndarray) -> Picture:
    return Picture(partial(_pixels, picture), c2w, K, picture.size, None)


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))


def _require_equal(names: Sequence[str], rows: list[list[Picture]], folder: Path) -> None:
    """Raises InputError naming the first view with other frames or of another size than the first view."""
    for name, row in zip(names, rows, strict=True):
        where = f"{fileio.quoted(folder / name)}"
        if len(row) != len(rows[0]):
            raise InputError(f"{where} has {len(row)} frames, {names[0]} has {len(rows[0])}; all views need the same")
        odd = next((picture.size for picture in row if picture.size != rows[0][0].size), None)
        if odd is not None:
            width, height = rows[0][0].size
            raise InputError(f"{where} is {odd[0]}×{odd[1]}, {names[0]} is {width}×{height}; all views need one size")


def _orbit(azimuths_deg: Sequence[float], elevation_deg: float, radius: float, clockwise: bool) -> np.ndarray:
    """Cameras [V, 4, 4] that look at the origin; azimuths run counter-clockwise from above, unless told otherwise."""
    azimuths = np.radians(azimuths_deg) * (-1 if clockwise else 1)
    return camera.look_at_origin(camera.orbit_positions(azimuths, np.radians(elevation_deg), radius))


def _pose(entry: dict[str, Any], meta: dict[str, Any], where: str) -> np.ndarray:
    if "transform_matrix" not in entry:
        azimuth = _number(entry, {}, "azimuth_deg", where, -3600, 3600)
        if azimuth is None:
            raise InputError(f"{where}: neither azimuth_deg nor transform_matrix is given")
        elevation = _number(entry, meta, "elevation_deg", where, -90, 90) or 0.0
        radius = _number(entry, meta, "radius", where, 1e-3, 1e6) or camera.DEFAULT_RADIUS
        return _orbit([azimuth], elevation, radius, False)[0]
    try:
        matrix = np.array(entry["transform_matrix"], float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: transform_matrix is not a matrix of numbers") from error
    if matrix.shape == (3, 4):
        matrix = np.vstack([matrix, [0, 0, 0, 1]])
    R = matrix[:3, :3]
    rigid = matrix.shape == (4, 4) and np.abs(R.T @ R - np.eye(3)).max() < 1e-3 and np.linalg.det(R) > 0
    if not rigid:
        raise InputError(f"{where}: transform_matrix must be rigid, 4×4 or 3×4")
    return matrix


def _intrinsics(entry: dict[str, Any], meta: dict[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    fx = _number(entry, meta, "fl_x", where, 1e-3, 1e9)
    if fx is None:
        fov = _number(entry, meta, "fov_deg", where, 0.01, 179) or camera.DEFAULT_FOV_DEG
        fx = camera.focal_length(np.radians(fov), size[0])
    fy = _number(entry, meta, "fl_y", where, 1e-3, 1e9) or fx
    cx, cy = (_number(entry, meta, key, where, 0, 1e9) for key in ("cx", "cy"))
    return camera.intrinsics(fx, fy, size[0] / 2 if cx is None else cx, size[1] / 2 if cy is None else cy)


def _number(entry: dict[str, Any], meta: dict[str, Any], key: str, where: str, low: float, high: float) -> float | None:
    value = entry.get(key, meta.get(key))
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{where}: {key} must be in {low:g}..{high:g}, got {value!r}")
    return float(value)


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in images.SUFFIXES for path in folder.iterdir())
