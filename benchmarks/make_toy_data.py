"""A toy of the toybox as a dataset with a train and a test split, laid out as the panda renders are.

    python benchmarks/make_toy_data.py INDEX OUT [--size 128]

21 views × 25 frames at elevation 10° to train on; 48 test views at unseen azimuths and elevations from −10° to 30°,
half of them between two frames.  INDEX counts toys of the toybox's test split.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import typer

from d2 import camera, fileio, images, toybox

VIEWS, FRAMES, TESTS = 21, 25, 48


def main(index: int, out: Path, size: int = 128) -> None:
    rig = camera.orbit(VIEWS, width=size, height=size)
    cells = [(rig.azimuth[v], rig.elevation[v], f) for v in range(VIEWS) for f in range(FRAMES)]
    write(index, out, "train", np.array(cells), size)
    rng = np.random.default_rng(index)
    azimuths = 2 * math.pi * (np.arange(TESTS) + rng.uniform(size=TESTS)) / TESTS
    elevations = np.radians(rng.uniform(-10, 30, TESTS))
    frames = rng.integers(0, FRAMES - 1, TESTS) + 0.5 * (np.arange(TESTS) % 2)
    write(index, out, "test", np.stack([azimuths, elevations, frames], -1), size)


def write(
    index: int,
    out: Path,
    split: str,
    cells: np.ndarray,  # [n, 3] azimuth and elevation in rad, frame
    size: int,
) -> None:
    toy = toybox.sample_toy("test", index).moved(1.0)
    azimuths, elevations, frames = cells.T
    pictures = toybox.straight_rgba(toybox.render(toy, frames / FRAMES, azimuths, elevations, size))
    c2w = camera.look_at_origin(camera.orbit_positions(azimuths, elevations, camera.DEFAULT_RADIUS))
    entries = []
    for k, picture in enumerate(pictures):
        name = f"{split}/{k:03d}.png"
        images.write_png(out / name, picture)
        entries.append({"file_path": name, "time": frames[k] / (FRAMES - 1), "transform_matrix": c2w[k].tolist()})
    focal = camera.focal_length(math.radians(camera.DEFAULT_FOV_DEG), size)
    meta = {"w": size, "h": size, "fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2, "frames": entries}
    fileio.write_json(out / f"transforms_{split}.json", meta)


if __name__ == "__main__":
    typer.run(main)
