"""COLMAP models, text or binary, of pinhole cameras: cameras.* and images.* beside a folder of images."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from d2 import camera, fileio, images
from d2.errors import InputError
from d2.recon.importers.pictures import Loose, Picture

CAP = 1 << 30  # bytes of a file; images.* holds every feature of every image
PLACES = ("sparse/0", "sparse", "colmap/sparse/0", ".")  # of the model in a project folder
PINHOLES = {"SIMPLE_PINHOLE": 3, "PINHOLE": 4}  # -> parameters
MODEL_NUMBERS = {0: "SIMPLE_PINHOLE", 1: "PINHOLE"}  # in binary files
MAX_NAME = 4096  # bytes
MAX_LENGTH = 1e9  # of a position or a focal length


class Pose(NamedTuple):
    """One registered image."""

    name: str  # relative to the folder of images
    w2c: np.ndarray  # [4, 4] OpenCV
    camera: int


class Intrinsics(NamedTuple):
    width: int
    height: int
    K: np.ndarray  # [3, 3] pixels; the centre of the first pixel is at 0.5, as here


def find_model(folder: Path) -> Path | None:
    """The folder of cameras.* and images.* within a project."""
    for place in PLACES:
        for suffix in (".bin", ".txt"):
            if all((folder / place / f"{name}{suffix}").is_file() for name in ("cameras", "images")):
                return folder / place
    return None


def read(folder: Path) -> Loose:
    """A static scene, turned upright: the origin where all cameras look, +z up, the first camera in front.

    The axes of a COLMAP model are arbitrary; the manifest keeps the similarity [4, 4] from them to ours.  Masks are
    taken from masks/NAME.png, by COLMAP's custom.  Raises InputError naming file and image.
    """
    model = find_model(folder)
    if model is None:
        raise InputError(f"{fileio.quoted(folder)} holds no cameras and images, .bin or .txt, in {', '.join(PLACES)}")
    cameras, poses = read_model(model)
    pictures = folder / "images"
    if not pictures.is_dir():
        raise InputError(f"{fileio.quoted(pictures)} does not exist; COLMAP's images are expected there")
    ordered = sorted(poses, key=lambda pose: pose.name)
    c2w, similarity = camera.upright(camera.from_viewmats(np.stack([pose.w2c for pose in ordered])))
    found = []
    for pose, matrix in zip(ordered, c2w, strict=True):
        path, mask = fileio.inside(pictures, pose.name), fileio.inside(folder / "masks", f"{pose.name}.png")
        lens, size = cameras[pose.camera], images.read_size(path)
        K = np.diag([size[0] / lens.width, size[1] / lens.height, 1]) @ lens.K  # images may have been made smaller
        found.append(Picture(partial(_pixels, path, mask if mask.is_file() else None), matrix, K, size, None))
    return Loose({"train": found}, record={"similarity": similarity.tolist()})


def read_model(folder: Path) -> tuple[dict[int, Intrinsics], list[Pose]]:
    """Cameras by number, and every registered image. Raises InputError for damage and for lenses that bend lines."""
    binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    suffix = ".bin" if binary else ".txt"
    lenses, registered = folder / f"cameras{suffix}", folder / f"images{suffix}"
    try:
        cameras = _binary_cameras(lenses) if binary else _text_cameras(lenses)
        poses = _binary_images(registered) if binary else _text_images(registered)
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{fileio.quoted(folder)} is not a readable COLMAP model: {str(error)[:200]}") from error
    if not poses:
        raise InputError(f"{fileio.quoted(registered)} holds no registered image")
    for pose in poses:
        if pose.camera not in cameras:
            raise InputError(f"{fileio.quoted(registered)}: {pose.name!r} has camera {pose.camera}, which is not there")
    return cameras, poses


def _text_cameras(path: Path) -> dict[int, Intrinsics]:
    found = {}
    for line in _lines(path):
        if line.strip() and not line.startswith("#"):
            number, model, width, height, *values = line.split()
            found[int(number)] = _intrinsics(path, model, int(width), int(height), [float(v) for v in values])
    return found


def _text_images(path: Path) -> list[Pose]:
    """Two lines an image, the second of features, which may be empty."""
    found, lines = [], iter(_lines(path))
    for line in lines:
        if line.strip() and not line.startswith("#"):
            _, *values = line.split(maxsplit=9)
            found.append(_pose(path, [float(v) for v in values[:7]], int(values[7]), values[8].strip()))
            next(lines, None)
    return found


def _binary_cameras(path: Path) -> dict[int, Intrinsics]:
    data = fileio.read_bytes(path, CAP)
    (count,), at, found = struct.unpack_from("<Q", data), 8, {}
    if count > len(data) // 24:
        raise ValueError(f"{path.name} announces {count} cameras")
    for _ in range(count):
        number, model, width, height = struct.unpack_from("<iiQQ", data, at)
        name = MODEL_NUMBERS.get(model, f"number {model}")
        values = struct.unpack_from(f"<{PINHOLES.get(name, 0)}d", data, at + 24)
        found[number] = _intrinsics(path, name, width, height, list(values))
        at += 24 + 8 * len(values)
    return found


def _binary_images(path: Path) -> list[Pose]:
    data = fileio.read_bytes(path, CAP)
    (count,), at, found = struct.unpack_from("<Q", data), 8, []
    if count > len(data) // 72:
        raise ValueError(f"{path.name} announces {count} images")
    for _ in range(count):
        *values, number = struct.unpack_from("<7di", data, at + 4)
        end = data.index(b"\0", at + 64, at + 64 + MAX_NAME)
        (features,) = struct.unpack_from("<Q", data, end + 1)
        found.append(_pose(path, values, number, data[at + 64 : end].decode()))
        at = end + 9 + 24 * features
        if at > len(data):
            raise ValueError(f"{path.name} is truncated")
    return found


def _intrinsics(path: Path, model: str, width: int, height: int, values: list[float]) -> Intrinsics:
    if model not in PINHOLES:
        raise InputError(
            f"{fileio.quoted(path)}: camera model {fileio.quoted(model)} is no pinhole;"
            " run colmap image_undistorter and import that"
        )
    if len(values) != PINHOLES[model] or not 0 < width < 1 << 20 or not 0 < height < 1 << 20:
        raise ValueError(f"a {model} camera of {width}×{height} with {len(values)} parameters")
    fx, fy, cx, cy = values if len(values) == 4 else (values[0], *values)
    if not all(abs(v) <= MAX_LENGTH for v in values) or min(fx, fy) <= 0:
        raise ValueError(f"the parameters {values} of a camera")
    return Intrinsics(width, height, camera.intrinsics(fx, fy, cx, cy))


def _pose(path: Path, values: list[float], number: int, name: str) -> Pose:
    quat, position = np.array(values[:4]), np.array(values[4:7])
    if len(position) != 3 or not (np.abs(values) <= MAX_LENGTH).all() or np.linalg.norm(quat) < 1e-6:
        raise ValueError(f"the pose of {name!r} in {path.name}")
    w, x, y, z = quat / np.linalg.norm(quat)
    w2c = np.eye(4)
    w2c[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    w2c[:3, 3] = position
    return Pose(name, w2c, number)


def _lines(path: Path) -> list[str]:
    return fileio.read_bytes(path, CAP).decode().splitlines()


def _pixels(path: Path, mask: Path | None) -> np.ndarray:
    rgba, has_alpha = images.read_rgba(path)
    if mask is None:
        return rgba if has_alpha else rgba[..., :3]
    alpha = np.asarray(images.open_image(mask).convert("L"))
    if alpha.shape != rgba.shape[:2]:
        raise InputError(f"{fileio.quoted(mask)} has another size than {fileio.quoted(path)}")
    return np.dstack([rgba[..., :3], alpha])
