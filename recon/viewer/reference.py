"""Reference pictures of a reconstruction: what its input looked like, small, for the viewer to show beside it."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from d2 import fileio
from d2.errors import InputError
from d2.recon import cameras
from d2.recon.dataset import Dataset

FOLDER = "reference"  # in a reconstruction's folder
INDEX = "sheets.json"
INPUT_SIDE, VIEW_SIDE = 256, 112  # pixels at most, of one picture's longer side
MAX_FRAMES, MAX_VIEWS = 100, 12
QUALITY = 80
MAX_FILE = 16 * fileio.MB


@dataclass(frozen=True)
class Sheet:
    """Equal pictures in one image, row by row, where each was seen from (a pose of page/camera.js) and when."""

    webp: bytes
    columns: int
    width: int  # of one picture, pixels
    height: int
    poses: list[dict[str, Any]]
    times: list[float]


def sheets(data: Dataset) -> dict[str, Sheet]:
    """ "input": the clip of the camera nearest to the front; "views": every side at the first moment."""
    focus = _focus(data)
    poses = [_pose(data, k, focus) for k in range(len(data))]
    views, times = data.views.tolist(), data.times.tolist()
    known = cameras.of(data)
    front = cameras.input_view(known.c2w, known.times, known.views)
    clip = sorted((k for k, view in enumerate(views) if view == front), key=lambda k: times[k])
    first = {view: k for k, view in sorted(enumerate(views), key=lambda item: -times[item[0]])}
    around = sorted(first.values(), key=lambda k: poses[k]["az"])
    return {
        "input": _sheet(data, _spread(clip, MAX_FRAMES), poses, INPUT_SIDE),
        "views": _sheet(data, _spread(around, MAX_VIEWS), poses, VIEW_SIDE),
    }


def save(folder: Path, data: Dataset) -> None:
    """Writes the sheets of a dataset into a reconstruction's folder."""
    index = {}
    for name, sheet in sheets(data).items():
        fileio.atomic_write(folder / FOLDER / f"{name}.webp", sheet.webp)
        index[name] = {key: value for key, value in asdict(sheet).items() if key != "webp"}
    fileio.write_json(folder / FOLDER / INDEX, index)


def load(folder: Path) -> dict[str, Sheet]:
    """What `save` wrote; empty where it did not. Raises InputError for a damaged index."""
    path = folder / FOLDER / INDEX
    if not path.is_file():
        return {}
    index = fileio.read_json(path)
    try:
        return {
            str(name): Sheet(
                fileio.read_bytes(fileio.inside(folder / FOLDER, f"{name}.webp"), MAX_FILE),
                *(int(entry[key]) for key in ("columns", "width", "height")),
                [_checked_pose(pose) for pose in entry["poses"]],
                [float(time) for time in entry["times"]],
            )
            for name, entry in index.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{fileio.quoted(path)} is damaged: {error}; remove the folder to do without") from error


def webp(rgba: np.ndarray) -> bytes:
    """Lossy WebP of uint8 [H, W, 4]."""
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "WEBP", quality=QUALITY, alpha_quality=QUALITY, method=4)
    return buffer.getvalue()


def _sheet(data: Dataset, chosen: list[int], poses: list[dict[str, Any]], side: int) -> Sheet:
    scale = min(1.0, side / max(data.width, data.height))
    width, height = max(1, round(data.width * scale)), max(1, round(data.height * scale))
    columns = math.ceil(math.sqrt(len(chosen)))
    whole = Image.new("RGBA", (columns * width, -(-len(chosen) // columns) * height))
    for index, k in enumerate(chosen):
        row, column = divmod(index, columns)
        whole.paste(_straight(data.images[k]).resize((width, height)), (column * width, row * height))
    seen = [poses[k] for k in chosen]
    return Sheet(webp(np.asarray(whole)), columns, width, height, seen, [float(data.times[k]) for k in chosen])


def _straight(premultiplied: torch.Tensor) -> Image.Image:  # [H, W, 4] uint8
    rgba = premultiplied.cpu().numpy().astype(np.float32)
    rgba[..., :3] *= 255 / np.maximum(rgba[..., 3:], 1)
    return Image.fromarray((rgba.clip(0, 255) + 0.5).astype(np.uint8))


def _pose(data: Dataset, k: int, focus: np.ndarray) -> dict[str, Any]:
    """The pose of an orbit camera without roll; angles in degrees, the field of view across the shorter side."""
    rotation, eye = _rotation_and_eye(data, k)
    back = -rotation[2]
    radius = max(float((eye - focus) @ back), 1e-3)
    K = data.Ks[k].double().numpy()
    half = min(0.5 * data.width / K[0, 0], 0.5 * data.height / K[1, 1])
    return {
        "az": round(math.degrees(math.atan2(back[0], -back[1])), 6) % 360,
        "el": math.degrees(math.asin(float(np.clip(back[2], -1, 1)))),
        "radius": radius,
        "target": (eye - radius * back).tolist(),
        "fov": math.degrees(2 * math.atan(half)),
    }


def _focus(data: Dataset) -> np.ndarray:  # [3] world
    """The point nearest to all optical axes."""
    A, b = 1e-9 * np.eye(3), np.zeros(3)
    for k in range(len(data)):
        rotation, eye = _rotation_and_eye(data, k)
        across = np.eye(3) - np.outer(rotation[2], rotation[2])
        A, b = A + across, b + across @ eye
    return np.linalg.solve(A, b)


def _rotation_and_eye(data: Dataset, k: int) -> tuple[np.ndarray, np.ndarray]:
    viewmat = data.viewmats[k].double().numpy()
    return viewmat[:3, :3], -viewmat[:3, :3].T @ viewmat[:3, 3]


def _spread(items: list[int], most: int) -> list[int]:
    """At most so many of them, evenly; the first and the last stay."""
    picked = np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))
    return [items[k] for k in picked]


def _checked_pose(pose: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: float(pose[key]) for key in ("az", "el", "radius", "fov")}
    return numbers | {"target": [float(value) for value in pose["target"]]}
