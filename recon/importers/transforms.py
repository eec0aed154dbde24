"""D-NeRF, Blender and nerfstudio folders: transforms_train.json with its siblings, or one transforms.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from d2.recon import dataset
from d2.recon.importers.pictures import Loose, Picture

SPLITS = ("train", "val", "test")


def read(folder: Path) -> Loose:
    """Every split there is, pictures and times as they are.  Raises InputError naming file and frame."""
    found = {}
    for split in SPLITS:
        if split == "train" or (folder / f"transforms_{split}.json").is_file():
            shots = dataset.shots(folder, split)
            moving = any(shot.time for shot in shots)
            found[split] = [
                Picture(partial(dataset.read_shot, s), s.c2w, s.K, (s.width, s.height), s.time if moving else None)
                for s in shots
            ]
    return Loose(found)
