"""Multi-view video with cameras: a run folder, or any folder in nerfstudio's or Blender's transforms.json layout."""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from d2 import camera, fileio, images
from d2.errors import InputError

RIGID_TOLERANCE = 1e-3
BACKGROUND_SPREAD = 6 / 255  # border pixels this close to one colour make it the background
VISIBLE_ALPHA = 64  # of 255: where a mask begins
MAX_LENGTH = 1e9  # world units or pixels: float32 squares stay finite
IMAGE_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Dataset:
    """n posed, timed images; colours are premultiplied with alpha."""

    images: Tensor  # [n, H, W, 4] uint8, premultiplied
    viewmats: Tensor  # [n, 4, 4] float32 world to camera, OpenCV
    Ks: Tensor  # [n, 3, 3] float32 pixels
    times: Tensor  # [n] float32 in 0..1
    views: Tensor  # [n] int64: cells with the same pose share a view
    has_alpha: bool
    background: Tensor  # [3] colour behind the object in images without alpha
    plain_background: bool  # whether image borders agree on that colour
    names: tuple[str, ...]  # file paths, for messages
    weights: Tensor | None = None  # [n] how much each picture counts in a fit; None: all the same

    def __len__(self) -> int:
        return len(self.images)

    @property
    def width(self) -> int:
        return self.images.shape[2]

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def frames(self) -> int:
        """How many different moments there are."""
        return len(self.times.unique())

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return replace(self, **{k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)})

    def subset(self, index: Tensor) -> Dataset:
        """Some of the cells, in the order of `index` [m]."""
        picked = {k: getattr(self, k)[index] for k in ("images", "viewmats", "Ks", "times", "views")}
        if self.weights is not None:
            picked["weights"] = self.weights[index]
        return replace(self, **picked, names=tuple(self.names[i] for i in index.tolist()))

    def on(self, background: Tensor) -> Dataset:  # [3]
        """The same cells before another background."""
        return replace(self, background=background)

    def halved(self) -> Dataset:
        """The same cells at half resolution; itself where a side is odd."""
        if self.width % 2 or self.height % 2:
            return self
        blocks = rearrange(self.images, "n (h a) (w b) c -> (a b) n h w c", a=2, b=2)
        pictures = (blocks.to(torch.int16).sum(0) + 2) // 4  # int16 holds the sum of four bytes
        half = torch.diag(torch.tensor([0.5, 0.5, 1.0], device=self.Ks.device))
        return replace(self, images=pictures.to(torch.uint8), Ks=half @ self.Ks)

    def shrunk(self, size: int) -> Dataset:
        """The same cells, halved until their longer side is below twice `size` pixels."""
        small = self
        while max(small.width, small.height) >= 2 * size and small.halved() is not small:
            small = small.halved()
        return small

    def digest(self) -> str:
        """A hash of pixels, cameras and times: the same data gives the same fit."""
        content = hashlib.sha256()
        for tensor in (self.images, self.viewmats, self.Ks, self.times, self.background):
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def camera_centres(self) -> Tensor:
        """World positions of the cameras [n, 3]."""
        return -torch.einsum("nji,nj->ni", self.viewmats[:, :3, :3], self.viewmats[:, :3, 3])


def find_transforms(path: str | Path, split: str = "train") -> Path:
    """The transforms file of a dataset: `path` itself, or in the folder transforms_{split}.json, transforms.json.

    Raises InputError when there is none.
    """
    path = Path(path)
    if os.path.isfile(path):  # pathlib's raises for names that are too long
        return path
    if not os.path.isdir(path):
        raise InputError(f"{fileio.quoted(path)} does not exist")
    for name in (f"transforms_{split}.json", "transforms.json"):
        if (path / name).is_file():
            return path / name
    raise InputError(f"{fileio.quoted(path)} holds neither transforms.json nor transforms_{split}.json")


def load(path: str | Path, split: str = "train", size: int | None = None) -> Dataset:
    """Reads a dataset; `size` area-filters every image so that its longer side has that many pixels.

    RGBA images, RGB with `mask_path`, or plain RGB before a background that is estimated from the borders.  No
    `time` anywhere means a static scene.  Raises InputError that names the frame and what is wrong with it.
    """
    file, meta, entries = _entries(path, split)
    poses = np.stack([read_pose(entry, k, file) for k, entry in enumerate(entries)])
    times = read_times(entries, file)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        cells = list(pool.map(lambda item: _cell(file, item[0], item[1], meta, size), enumerate(entries)))
    sizes = {cell.rgba.shape for cell in cells}
    if len(sizes) > 1:
        odd = next(k for k, cell in enumerate(cells) if cell.rgba.shape != cells[0].rgba.shape)
        name = entries[odd]["file_path"]
        raise InputError(f"{fileio.quoted(file)}: frame {odd} differs in size from frame 0 ({name!r})")
    pictures = np.stack([cell.rgba for cell in cells])
    has_alpha = any(cell.has_alpha for cell in cells) and bool((pictures[..., 3] < 250).any())
    if not (pictures[..., 3] >= VISIBLE_ALPHA).any():
        raise InputError(f"{fileio.quoted(file)}: no foreground, every image is transparent")
    border, is_plain = _border_colour(pictures)
    return Dataset(
        images=torch.from_numpy(pictures),
        viewmats=torch.from_numpy(camera.viewmats(poses)).float(),
        Ks=torch.from_numpy(np.stack([cell.K for cell in cells])).float(),
        times=torch.tensor(times, dtype=torch.float32),
        views=view_ids(poses),
        has_alpha=has_alpha,
        background=torch.ones(3) if has_alpha else border,
        plain_background=is_plain,
        names=tuple(str(entry["file_path"]) for entry in entries),
    )


class Shot(NamedTuple):
    """One entry of a transforms file, checked, its pixels not read."""

    image: Path
    mask: Path | None
    c2w: np.ndarray  # [4, 4] camera to world, OpenGL
    K: np.ndarray  # [3, 3] pixels of the image as stored
    width: int
    height: int
    time: float  # 0..1


def shots(path: str | Path, split: str = "train") -> list[Shot]:
    """Every image of a dataset with its camera and moment, as `load` reads them. Raises InputError as it does."""
    file, meta, entries = _entries(path, split)
    found = []
    for k, (entry, time) in enumerate(zip(entries, read_times(entries, file), strict=True)):
        image = _image_path(file, k, entry)
        width, height = images.read_size(image)
        K = read_intrinsics(entry, meta, width, height, f"{fileio.quoted(file)}: frame {k}")
        mask = _resolve(file, k, entry, "mask_path") if "mask_path" in entry else None
        found.append(Shot(image, mask, read_pose(entry, k, file), K, width, height, time))
    return found


def _entries(path: str | Path, split: str) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The transforms file of a split, its content and its frames; distorted cameras are refused."""
    file = find_transforms(path, split)
    meta = fileio.read_json(file, fileio.TRANSFORMS_CAP)
    entries = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{fileio.quoted(file)}: expected a list of frames, found none")
    for part in (meta, *entries):
        refuse_distortion(part, file)
    return file, meta, entries


def read_shot(shot: Shot) -> np.ndarray:  # [H, W, 4] uint8, straight alpha
    """The picture of a shot, its mask applied."""
    rgba, _ = images.read_rgba(shot.image)
    return rgba if shot.mask is None else _with_mask(rgba, shot.mask)


@dataclass(frozen=True)
class _Cell:
    rgba: np.ndarray  # [H, W, 4] uint8, premultiplied
    K: np.ndarray  # [3, 3] for that size
    has_alpha: bool


def _cell(file: Path, k: int, entry: dict[str, Any], meta: dict[str, Any], size: int | None) -> _Cell:
    path = _image_path(file, k, entry)
    rgba, has_alpha = images.read_rgba(path)
    height, width = rgba.shape[:2]
    K = read_intrinsics(entry, meta, width, height, f"{fileio.quoted(file)}: frame {k}")
    if "mask_path" in entry:
        rgba, has_alpha = _with_mask(rgba, _resolve(file, k, entry, "mask_path")), True
    scale = 1.0 if size is None else size / max(width, height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    K = np.diag([w / width, h / height, 1.0]) @ K
    return _Cell(images.to_uint8(images.resize_rgba(rgba, w, h)), K, has_alpha)


def _image_path(file: Path, k: int, entry: dict[str, Any]) -> Path:
    """The image of a frame; Blender's files leave the suffix out."""
    named = _resolve(file, k, entry, "file_path")
    for suffix in IMAGE_SUFFIXES:
        candidate = Path(f"{named}{suffix}")
        if os.path.isfile(candidate):
            return candidate
    raise InputError(f"{fileio.quoted(file)}: frame {k}: no image at {fileio.quoted(named)}")


def _resolve(file: Path, k: int, entry: dict[str, Any], field: str) -> Path:
    relative = entry.get(field)
    if not isinstance(relative, str) or not relative:
        raise InputError(f"{fileio.quoted(file)}: frame {k}: {field} must be text, got {relative!r}")
    try:
        return fileio.inside(file.parent, relative)
    except InputError as error:
        raise InputError(f"{fileio.quoted(file)}: frame {k}: {error}") from error


def _with_mask(rgba: np.ndarray, path: Path) -> np.ndarray:
    mask = np.asarray(images.open_image(path).convert("L"))
    if mask.shape != rgba.shape[:2]:
        raise InputError(
            f"{fileio.quoted(path)}: mask is {mask.shape[1]}×{mask.shape[0]}, image {rgba.shape[1]}×{rgba.shape[0]}"
        )
    return np.dstack([rgba[..., :3], mask])


def read_intrinsics(entry: dict[str, Any], meta: dict[str, Any], width: int, height: int, where: str) -> np.ndarray:
    """K for the image as stored: from fl_x fl_y cx cy (frame before file), else from camera_angle_x."""

    def get(key: str) -> float | None:
        value = entry.get(key, meta.get(key))
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-6 < value <= MAX_LENGTH:
            raise InputError(f"{where}: {key} must be a positive number, got {value!r}")
        return float(value)

    w, h = get("w") or width, get("h") or height
    if abs(w / h - width / height) > 0.02 * width / height:
        raise InputError(f"{where}: w × h is {w:g}×{h:g} but the image is {width}×{height}")
    fx, angle = get("fl_x"), get("camera_angle_x")
    if fx is None and angle is None:
        raise InputError(f"{where}: neither fl_x nor camera_angle_x is given")
    if fx is None:
        if not 0 < angle < math.pi:
            raise InputError(f"{where}: camera_angle_x must be within 0..π, got {angle}")
        fx = camera.focal_length(angle, w)
    fy = get("fl_y") or fx
    sx, sy = width / w, height / h
    return camera.intrinsics(fx * sx, fy * sy, (get("cx") or w / 2) * sx, (get("cy") or h / 2) * sy)


def refuse_distortion(meta: dict[str, Any], file: Path) -> None:
    if str(meta.get("camera_model", "OPENCV")).upper() not in (
        "OPENCV",
        "PINHOLE",
        "SIMPLE_PINHOLE",
        "PERSPECTIVE",
    ):
        raise InputError(f"{fileio.quoted(file)}: camera_model {meta['camera_model']!r} is not a pinhole camera")
    for key in ("k1", "k2", "k3", "k4", "p1", "p2"):
        value = meta.get(key, 0)
        if not isinstance(value, int | float) or abs(value) > 1e-6:
            raise InputError(f"{fileio.quoted(file)}: lens distortion {key} = {value!r}; undistort the images first")


def read_pose(entry: dict[str, Any], k: int, file: Path) -> np.ndarray:
    """c2w [4, 4], checked rigid."""
    where = f"{fileio.quoted(file)}: frame {k}"
    try:
        matrix = np.array(entry.get("transform_matrix"), dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: transform_matrix is not a matrix of numbers") from error
    if matrix.shape == (3, 4):
        matrix = np.vstack([matrix, [0, 0, 0, 1]])
    if matrix.shape != (4, 4) or not (np.abs(matrix) <= MAX_LENGTH).all():
        raise InputError(f"{where}: transform_matrix must be 4×4 (or 3×4), finite and within ±{MAX_LENGTH:g}")
    R = matrix[:3, :3]
    if np.abs(R.T @ R - np.eye(3)).max() > RIGID_TOLERANCE:
        raise InputError(f"{where}: transform_matrix is not rigid (it scales or shears)")
    if np.linalg.det(R) < 0:
        raise InputError(f"{where}: transform_matrix mirrors")
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > RIGID_TOLERANCE:
        raise InputError(f"{where}: the last row of transform_matrix must be 0 0 0 1")
    return matrix


def read_times(entries: list[dict[str, Any]], file: Path) -> list[float]:
    if all("time" not in entry for entry in entries):
        return [0.0] * len(entries)
    times = []
    for k, entry in enumerate(entries):
        time = entry.get("time")
        if not isinstance(time, int | float) or isinstance(time, bool) or not 0 <= time <= 1:
            raise InputError(f"{fileio.quoted(file)}: frame {k}: time must be in 0..1, got {time!r}")
        times.append(float(time))
    return times


def view_ids(poses: np.ndarray) -> Tensor:
    """Numbers the different poses in order of first appearance."""
    ids: dict[bytes, int] = {}
    rounded = np.round(poses, 6) + 0.0  # -0.0 and 0.0 are one pose
    return torch.tensor([ids.setdefault(pose.tobytes(), len(ids)) for pose in rounded])


def _border_colour(pictures: np.ndarray) -> tuple[Tensor, bool]:
    """The colour of image borders and True where most agree on one, else black: it is then part of the scene."""
    rgb = pictures[..., :3].astype(np.float32) / 255
    border = np.concatenate([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], 1).reshape(-1, 3)
    colour = np.median(border, 0)
    is_plain = bool((np.abs(border - colour).max(1) < BACKGROUND_SPREAD).mean() > 0.8)
    return torch.from_numpy(colour if is_plain else np.zeros(3, np.float32)), is_plain
