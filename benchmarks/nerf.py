"""The method d2-4dgs in nerfstudio: trained, evaluated and imported, and how far both sides' pictures are apart.

    .venv-nerfstudio/bin/python benchmarks/nerf.py [--steps 2000] [--work DIR]

`make test-nerfstudio` makes that environment.  Trains on the panda of tests/data on the CPU, which takes minutes.
Writes benchmarks/results/nerfstudio.json.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import typer

from d2 import fileio, machine
from d2.recon import dataset, train
from d2.recon.config import ReconstructConfig
from d2.recon.gaussians import Gaussians4D
from d2.recon.nerf.checkpoints import import_checkpoint
from d2.recon.sources import GAUSSIANS

ROOT = Path(__file__).parent.parent
PANDA = ROOT / "tests/data/panda"


def main(steps: int = 2000, work: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        begin = time.perf_counter()
        _nerfstudio(
            "train", "d2-4dgs", "--data", PANDA, "--output-dir", folder, "--vis", "tensorboard", "--timestamp", "d2",
            "--machine.device-type", "cpu", "--max-num-iterations", steps, "--pipeline.model.preset", "fast",
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        home = folder / "panda/d2-4dgs/d2"
        _nerfstudio("eval", "--load-config", home / "config.yml", "--output-path", folder / "eval.json")
        _nerfstudio(
            "render", "dataset", "--load-config", home / "config.yml", "--split", "test", "--image-format", "png",
            "--rendered-output-names", "raw-rgb", "--output-path", folder / "renders",
        )  # fmt: skip
        model = Gaussians4D.load(import_checkpoint(home, folder / "imported") / GAUSSIANS)
        cells = dataset.load(PANDA, "test")
        theirs = json.loads((folder / "eval.json").read_text())["results"]
        result = {
            "machine": machine.describe(),
            "versions": {name: importlib.metadata.version(name) for name in ("nerfstudio", "torch", "numpy", "viser")},
            "dataset": "tests/data/panda: 21 views x 13 frames at 128, 24 test views",
            "steps": steps,
            "seconds": round(seconds, 1),
            "gaussians": len(model),
            "psnr": {
                "ns-eval": round(theirs["psnr"], 3),
                "d2": round(train.evaluate_psnr(model, cells, ReconstructConfig()), 3),
            },
            "ssim_ns-eval": round(theirs["ssim"], 4),
            "renders": _differences(model, cells, folder / "renders"),
        }
    fileio.write_json(ROOT / "benchmarks/results/nerfstudio.json", result)
    typer.echo(json.dumps(result, indent=2))


def _differences(model: Gaussians4D, cells: dataset.Dataset, renders: Path) -> dict[str, float]:
    """Of the values of all test views, between what ns-render wrote (floats) and what d2 draws.

    Cameras differ in their last bits, so that a few Gaussians at the least alpha that is drawn, 1/255, come and go.
    """
    found = []
    for k, name in enumerate(cells.names):
        (path,) = renders.rglob(f"{Path(name).stem}.npy.gz")
        with gzip.open(path) as file:
            theirs = np.load(io.BytesIO(file.read()))
        found.append(np.abs(train.draw_cell(model, cells, k).clamp(0, 1).numpy() - theirs))
    apart = np.stack(found)
    return {
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "share_beyond_0.001": float((apart > 1e-3).mean()),
    }


def _nerfstudio(*words: object) -> None:
    command = [sys.executable, str(ROOT / "tests/nerf/ns.py"), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    typer.run(main)
