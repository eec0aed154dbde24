"""Sizes and times of every splat format and of the page for 20,000 Gaussians and 25 frames.

    python benchmarks/formats.py [--count 20000] [--frames 25]   (SOG needs node and splat-transform)

Writes benchmarks/results/formats.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import typer

from d2 import fileio, machine
from d2.recon.exports import export
from d2.recon.gaussians import Gaussians4D

FORMATS = ("ply", "spz", "splat", "sog", "glb", "usd", "usdz", "usd-points", "splatv", "4dgs", "html")


def main(count: int = 20_000, frames: int = 25) -> None:
    g = torch.Generator().manual_seed(0)
    gaussians = Gaussians4D(
        means=0.4 * torch.randn(count, 3, generator=g), velocities=0.2 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g), log_durations=torch.log(0.1 + torch.rand(count, generator=g)),
        quats=torch.randn(count, 4, generator=g), log_scales=0.4 * torch.randn(count, 3, generator=g) - 4,
        opacity_logits=torch.randn(count, generator=g), sh=0.5 * torch.randn(count, 1, 3, generator=g),
    )  # fmt: skip
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        export(gaussians, ["usd"], Path(folder) / "warm", frames=2)
        for what in FORMATS:
            begin = time.perf_counter()
            path = export(gaussians, [what], folder, frames=frames)[what]
            files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            rows[what] = {"seconds": round(time.perf_counter() - begin, 2), "megabytes": round(size / 1e6, 2)}
            print(what, rows[what], flush=True)
    record = {"gaussians": count, "frames": frames, "machine": machine.describe(), "formats": rows}
    fileio.write_json(Path(__file__).parent / "results" / "formats.json", record)


if __name__ == "__main__":
    typer.run(main)
