"""D-NeRF, Blender and nerfstudio folders: transforms_train.json with its siblings, or one transforms.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from d2 import images
from d2.recon import dataset
from d2.recon.importers.pictures import Loose, Picture

SPLITS = ("train", "val", "test")


def read(folder: Path) -> Loose:
    """Every split there is, pictures and times as they are.  Raises InputError naming file and frame."""
    found = {}
    for split in SPLITS:
        if split == "train" or (folder / f"transforms_{split}.json").is_file():
            frames = dataset.posed(folder, split)
            found[split] = [
                Picture(partial(dataset.read_posed, f), f.c2w, f.K, images.read_size(f.image), f.time) for f in frames
            ]
    return Loose(found)
