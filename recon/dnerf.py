"""D-NeRF's protocol for who has its data: 800² pictures at 400² on white, its own split files, a row for each scene."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from d2 import fileio, images
from d2.errors import InputError
from d2.recon import benchmark, dataset
from d2.recon.pipeline import Observer

STORED, SIZE = 800, 400  # pixels
SPLITS = ("train", "val", "test")
COLUMNS = ("psnr", "ssim", "psnr_foreground", "psnr_worst", "seconds", "gaussians")


def measure(
    folder: str | Path,
    seconds: float = 120.0,
    preset: str | Path = "quality",
    sets: tuple[str, ...] = (),
    device: str = "auto",
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Fits each scene's train split for `seconds`, measures its test split, and averages over the scenes.

    The val split is required and not looked at, as in the papers.  Pictures are RGBA and composited on white; halving
    them is an area filter in premultiplied alpha.  Raises InputError, before any fit, for a scene without its three
    split files, without alpha or of another size than 800².
    """
    found = _scenes(Path(folder))
    for scene in found:
        _check(scene)
    rows = {}
    for scene in found:
        (observer or Observer()).message(f"Scene {scene.name}")
        rows[scene.name] = benchmark.reconstruct(scene, SIZE, seconds, preset, sets, device, None, observer)
    mean = {
        key: round(statistics.fmean(row[key] for row in rows.values()), 4)
        for key in COLUMNS
        if all(row[key] is not None for row in rows.values())
    }
    return {"protocol": f"D-NeRF, {STORED}² at {SIZE}², white", "scenes": rows, "mean": mean}


def as_text(result: dict[str, Any]) -> str:
    """The table, the mean last."""
    rows = {**result["scenes"], "mean": result["mean"]}
    width = max(map(len, rows))
    lines = [" ".join([" " * width, *(f"{key:>15}" for key in COLUMNS)])]
    for name, row in rows.items():
        cells = ("" if row.get(key) is None else f"{row[key]:.3f}" for key in COLUMNS)
        lines.append(" ".join([f"{name:<{width}}", *(f"{cell:>15}" for cell in cells)]))
    return "\n".join(lines)


def _scenes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{fileio.quoted(folder)} is not a folder of D-NeRF scenes")
    if (folder / "transforms_train.json").is_file():
        return [folder.resolve()]
    found = sorted(path.parent for path in folder.glob("*/transforms_train.json"))
    if not found:
        raise InputError(f"{fileio.quoted(folder)} holds no scene with transforms_train.json")
    return found


def _check(scene: Path) -> None:
    for split in SPLITS:
        if not (scene / f"transforms_{split}.json").is_file():
            raise InputError(
                f"{fileio.quoted(scene)}: transforms_{split}.json is missing; the protocol has three splits"
            )
        frames = dataset.shots(scene, split)
        size = images.read_size(frames[0].image)
        if size != (STORED, STORED):
            raise InputError(f"{fileio.quoted(frames[0].image)} is {size[0]}×{size[1]}, expected {STORED}×{STORED}")
        if split != "val" and not images.read_rgba(frames[0].image)[1]:
            raise InputError(f"{fileio.quoted(frames[0].image)} has no alpha, which the protocol puts on white")
