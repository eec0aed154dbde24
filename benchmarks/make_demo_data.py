"""Makes tests/data/panda from the full-size panda renders: 21 views × 13 frames and 24 test views at 128².

    python benchmarks/make_demo_data.py DATASET [OUT]

DATASET is a folder with transforms_train.json and transforms_test.json.  Every second frame of the clip is kept and
every second test view; images are area-filtered in premultiplied alpha.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from d2 import fileio, images

SIZE = 128
KEEP_EVERY = 2


def main(source: Path, target: Path) -> None:
    for split in ("train", "test"):
        meta = fileio.read_json(source / f"transforms_{split}.json", fileio.TRANSFORMS_CAP)
        scale = SIZE / meta["w"]
        kept = [e for k, e in enumerate(meta["frames"]) if e.get("frame", k) % KEEP_EVERY == 0]
        for entry in kept:
            images.write_png(target / entry["file_path"], shrink(source / entry["file_path"]))
        scaled = {key: meta[key] * scale for key in ("fl_x", "fl_y", "cx", "cy")}
        fileio.write_json(target / f"transforms_{split}.json", meta | scaled | {"w": SIZE, "h": SIZE, "frames": kept})


def shrink(path: Path) -> np.ndarray:
    """Straight-alpha uint8 RGBA [SIZE, SIZE, 4]."""
    rgba = images.resize_rgba(images.read_rgba(path)[0], SIZE, SIZE)
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    return images.to_uint8(rgba)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "tests/data/panda"))
