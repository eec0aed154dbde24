"""A toy of the toybox as a dataset with a train and a test split, laid out as the panda renders are.

    python benchmarks/make_toy_data.py INDEX OUT [--size 128] [--generated]

21 views × 25 frames at elevation 10° to train on; 48 test views at unseen azimuths and elevations from −10° to 30°,
half of them between two frames.  INDEX counts toys of the toybox's test split.  With --generated the views to train
on are what `d2 generate --preset tiny` makes of a video of the toy (8 × 8 at 64²): OUT is its run folder.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import typer

from d2 import camera, fileio, generation, images, toybox

VIEWS, FRAMES, TESTS = 21, 25, 48
ELEVATION = 10.0  # degrees, of the views to train on
SAMPLED, SAMPLED_FRAMES = 64, 8  # pixels and frames of the preset tiny


def main(index: int, out: Path, size: int = 128, generated: bool = False) -> None:
    if generated:
        size = SAMPLED
        sample(index, out)
    else:
        rig = camera.orbit(VIEWS, ELEVATION, width=size, height=size)
        cells = [(rig.azimuth[v], rig.elevation[v], f) for v in range(VIEWS) for f in range(FRAMES)]
        write(index, out, "train", np.array(cells), size)
    rng = np.random.default_rng(index)
    azimuths = 2 * math.pi * (np.arange(TESTS) + rng.uniform(size=TESTS)) / TESTS
    elevations = np.radians(rng.uniform(-10, 30, TESTS))
    frames = rng.integers(0, FRAMES - 1, TESTS) + 0.5 * (np.arange(TESTS) % 2)
    write(index, out, "test", np.stack([azimuths, elevations, frames], -1), size)


def sample(index: int, out: Path) -> None:
    """What the embedded pair makes of the toy as its first camera sees it, at the test split's moments 0 to 1."""
    toy, moments = toybox.sample_toy("test", index).moved(1.0), np.linspace(0, FRAMES - 1, SAMPLED_FRAMES)
    still = np.zeros(SAMPLED_FRAMES)
    pictures = toybox.render(toy, moments / FRAMES, still, still + math.radians(ELEVATION), SAMPLED)
    with tempfile.TemporaryDirectory() as folder:
        for k, picture in enumerate(toybox.straight_rgba(pictures)):
            images.write_png(Path(folder) / f"{k:03d}.png", picture)
        generation.generate(folder, out, preset="tiny")


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
