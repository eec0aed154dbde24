"""One tiny run from pictures to Gaussians against recorded numbers: what must be the same bits, and what only nearly.

Bits: what is drawn, resized and written by integers.  Whatever passed through a network or a fit depends on the vector
units of the CPU, and random normals do in their last bit, so these have tolerances.  That one machine makes the same
bits every time is tested where resuming is.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from faults.tiny import tiny_reconstruct

from d2 import images
from d2.noise import cell_noise
from d2.recon.gaussians import Gaussians4D
from d2.run import Run

PIXELS = {
    "generate/input/f000.png": "4807943e658d0d98",
    "generate/input/f001.png": "5754cc2b3f5c4805",
    "generate/input/f002.png": "a0dda0cf47dc3c4e",
    "generate/reference_video/f001.png": "a74720e0b32a0eff",
}
LEVELS = [[139.06, 142.64, 140.35], [139.15, 143.70, 140.39], [139.15, 141.97, 139.87]]  # mean of RGB, view by view
NORMALS = [0.9007592797279358, 1.537103533744812, -0.43604549765586853]


def test_what_is_made_of_the_input_is_the_same_to_the_bit(finished):
    for name, digest in PIXELS.items():
        pixels = np.ascontiguousarray(images.open_image(finished / name))
        assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == digest, name


def test_noise_is_the_recorded_one():
    drawn = cell_noise(3, "start", 1, (0, 2), (2, 5, 5)).flatten()[[0, 17, 49]]
    assert drawn.tolist() == pytest.approx(NORMALS, abs=1e-6)


def test_every_cell_of_a_sampled_matrix_is_as_bright_as_recorded(finished):
    matrix = Run.open(finished).matrix()
    found = [[float(matrix[v, f][..., :3].mean()) for f in range(3)] for v in range(3)]
    assert np.abs(np.array(found) - LEVELS).max() < 0.1


def test_a_reconstruction_ends_where_recorded(tiny_dataset, tmp_path, one_thread):
    made = tiny_reconstruct(tiny_dataset, tmp_path / "o", "iterations=30")
    model = Gaussians4D.load(made.model)
    spread = model.means.std(0).mean().item()
    assert (made.gaussians, made.psnr, spread) == pytest.approx((60, 20.27, 0.2816), rel=2e-3)
