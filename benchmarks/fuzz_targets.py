"""What benchmarks/fuzz.py damages: honest files of every kind that d2 reads, and what reads them."""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from stages import matrix_run

from d2 import config, fileio, images, inputs
from d2.errors import D2Error
from d2.models import weights
from d2.recon import dataset, shots, sources
from d2.recon.formats import glb, ply, splat, spz
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.importers import colmap, videos
from d2.run import Run
from d2.settings import GenerateConfig
from d2.snapshot import load as load_snapshot

COLMAP_TEXTS = (b"# lenses\n1 PINHOLE 10 12 20 20 5 6\n2 SIMPLE_PINHOLE 10 12 20 5 6\n",
                b"1 1 0 0 0 0 0 3 1 a.png\n1 2 3\n2 0.9 0.1 0 0 0.1 0 3 1 b.png\n\n")  # fmt: skip
COLMAP_BINARIES = (
    struct.pack("<QiiQQ4d", 1, 1, 1, 10, 12, 20, 20, 5, 6),
    struct.pack("<Q", 2) + b"".join(
        struct.pack("<i7di", k, 1, 0, 0, 0, 0.1 * k, 0, 3, 1) + name + struct.pack("<Q2dq", 1, 1, 2, -1)
        for k, name in ((1, b"a.png\0"), (2, b"b.png\0"))
    ),
)  # fmt: skip
POSE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]]
CAMERAS = json.dumps({
    "fps": 24, "fov_deg": 33.8, "radius": 3.7, "cameras": [
        {"file": "a", "azimuth_deg": 0, "elevation_deg": 10},
        {"file": "b", "transform_matrix": POSE, "fl_x": 90, "fl_y": 90, "cx": 5, "cy": 6},
    ],
}).encode()  # fmt: skip
CAMERA_PATH = json.dumps({
    "camera_type": "perspective", "render_width": 64, "render_height": 48, "fps": 24,
    "camera_path": [{"camera_to_world": [*POSE[0], *POSE[1], *POSE[2], *POSE[3]], "fov": 40, "time": 0.5}] * 2,
}).encode()  # fmt: skip


class Target(NamedTuple):
    """A kind of file: honest ones, and whatever reads them."""

    seeds: list[bytes]
    suffix: str
    read: Callable[[Path], object]
    zipped: bool = False  # gzip, to be damaged inside too


def targets(place: Path) -> dict[str, Target]:
    """What Python reads from elsewhere; USD and videos are read by other programs."""
    torch.manual_seed(0)
    moment = some_gaussians(3, 4)
    run = matrix_run(place / "run") if not (place / "run").exists() else Run.open(place / "run")
    files = {name: place / name for name in ("model.safetensors", "preset.yaml", "state.safetensors")}
    Gaussians4D.still(moment).save(files["model.safetensors"], {"fps": "24", "frames": "3"})
    settings = config.resolved(config.load(GenerateConfig, {}))
    fileio.write_yaml(files["preset.yaml"], {key: settings[key] for key in list(settings)[:12]})
    manifest, transforms = ((run.folder / name).read_bytes() for name in ("run.json", "transforms.json"))
    return {
        "ply": Target([ply.encode(moment), *other_plys()], ".ply", finite(ply.read)),
        "splat": Target([splat.encode(moment)], ".splat", finite(splat.read)),
        "spz": Target([spz.encode(moment), spz.encode(some_gaussians(2, 1))], ".spz", finite(spz.read), zipped=True),
        "glb": Target([glb.encode(moment)], ".glb", finite(glb.read)),
        "run": Target([manifest], ".json", read_run),
        "transforms": Target([transforms], ".json", read_transforms),
        "yaml": Target([files["preset.yaml"].read_bytes(), b"elevations_deg: [1, 2.5, 1e-3]\n"], ".yaml", read_yaml),
        "safetensors": Target([files["model.safetensors"].read_bytes()], ".safetensors", read_safetensors),
        "image": Target(pictures(), ".gif", read_image),
        "colmap": Target([*COLMAP_TEXTS, *COLMAP_BINARIES], ".txt", read_colmap),
        "cameras": Target([CAMERAS, CAMERA_PATH], ".json", read_cameras),
    }  # fmt: skip


def read_run(file: Path) -> None:
    """As every stage opens a run: the manifest, the matrix, the files."""
    folder = file.parent / "mutated_run"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(file.read_bytes())
    run = Run.open(folder)
    for stage in run.manifest["stages"]:
        run.stage(stage)
    assert run.fps > 0


def read_transforms(file: Path) -> None:
    (file.parent / "run" / "transforms.json").write_bytes(file.read_bytes())
    dataset.load(file.parent / "run")


def read_yaml(file: Path) -> None:
    config.load(GenerateConfig, file)


def read_safetensors(file: Path) -> None:
    """By everything that reads such files: a model, a state, weights."""
    errors = []
    for read in (Gaussians4D.load, load_snapshot, weights.read_header):
        try:
            read(file)
        except D2Error as error:
            errors.append(error)
    if len(errors) == 3:
        raise errors[0]


def finite(read: Callable[..., Gaussians3D]) -> Callable[[Path], None]:
    """What is read is finite; other warnings than that rows were dropped are let out."""

    def call(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*they are dropped")
            found = read(path)
        assert len(found) and all(tensor.isfinite().all() for tensor in vars(found).values()), "not finite"

    return call


def read_image(file: Path) -> None:
    """As a still and, where it moves, as a clip; whatever it is called."""
    images.read_rgba(file)
    inputs.read(file, 2, notice=lambda text: None)


def read_colmap(file: Path) -> None:
    """In the place of each file of a model whose others are honest."""
    damaged, errors = file.read_bytes(), []
    for suffix, honest in ((".txt", COLMAP_TEXTS), (".bin", COLMAP_BINARIES)):
        folder = file.parent / f"colmap{suffix}"
        model = folder / "sparse" / "0"
        if not model.exists():
            model.mkdir(parents=True)
            fileio.atomic_write(folder / "images" / "a.png", pictures()[0])
            fileio.atomic_write(folder / "images" / "b.png", pictures()[0])
        for changed in range(2):
            for k, name in enumerate(("cameras", "images")):
                (model / f"{name}{suffix}").write_bytes(damaged if k == changed else honest[k])
            try:
                colmap.read(folder)
            except D2Error as error:
                errors.append(error)
    if len(errors) == 4:
        raise errors[0]


def read_cameras(file: Path) -> None:
    """As the cameras of videos, and as a camera path for a picture."""
    folder, errors = file.parent / "videos", []
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        if not (folder / name).exists():
            fileio.atomic_write(folder / name, pictures()[0])
    (folder / "cameras.json").write_bytes(file.read_bytes())
    found = sources.find(file.parent / "model.safetensors")
    for read in (lambda: videos.with_cameras(folder), lambda: shots.plan(str(file), found, shots.Wishes())):
        try:
            read()
        except D2Error as error:
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]


# -- honest files ----------------------------------------------------------------------------------------


def some_gaussians(count: int, bases: int) -> Gaussians3D:
    return Gaussians3D(
        torch.randn(count, 3), torch.nn.functional.normalize(torch.randn(count, 4), dim=-1), torch.rand(count, 3) + 0.1,
        torch.rand(count), torch.randn(count, bases, 3) * 0.3,
    )  # fmt: skip


def other_plys() -> list[bytes]:
    """What another tool may write: text, and numbers that begin with their high byte."""
    head, end, body = ply.encode(some_gaussians(2, 1)).partition(b"end_header\n")
    text = "".join(" ".join(map(str, row)) + "\n" for row in struct.iter_unpack("<17f", body)).encode()
    swapped = np.frombuffer(body, "<f4").astype(">f4").tobytes()
    little = b"binary_little_endian"
    return [head.replace(little, b"ascii") + end + text, head.replace(little, b"binary_big_endian") + end + swapped]


def pictures() -> list[bytes]:
    """One picture in every format that is read, and moving ones."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 10, 4), np.uint8)
    levels[:3, :, 3] = 0
    picture, found = Image.fromarray(levels), []
    moving = {"save_all": True, "append_images": [Image.new("RGBA", (10, 12), "red")]}
    for format, options in (
        ("PNG", {}), ("PNG", moving), ("GIF", moving), ("WEBP", {}), ("JPEG", {}), ("BMP", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        picture.convert("RGB" if format in ("JPEG", "BMP") else "RGBA").save(buffer, format, **options)
        found.append(buffer.getvalue())
    return found
