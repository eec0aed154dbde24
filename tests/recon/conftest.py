import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from d2 import camera
from d2.recon.raster import rasterize
from d2.run import Run

sys.path.insert(0, str(Path(__file__).parent))  # scenes.py
from scenes import FRAMES, SIZE, VIEWS, moving_ball


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished matrix of the ball, written as stage 1 writes it."""
    folder = tmp_path_factory.mktemp("ball") / "run"
    rig = camera.orbit(VIEWS, radius=3.0, width=SIZE, height=SIZE)
    truth = moving_ball()

    def cell(v: int, f: int) -> np.ndarray:
        arguments, motion = truth.activated(torch.tensor([f / (FRAMES - 1)]))
        image, alpha, _ = rasterize(
            **arguments, viewmats=torch.from_numpy(rig.viewmats[v : v + 1]).float(),
            Ks=torch.from_numpy(rig.K[None]).float(), width=SIZE, height=SIZE, sh_degree=0, motion=motion,
        )  # fmt: skip
        rgba = torch.cat([image[0] / alpha[0].clamp_min(1e-6), alpha[0]], -1)
        return (rgba.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    Run.create(folder, fps=12).write_matrix(cell, FRAMES, rig, {"source": "test"})
    return folder
