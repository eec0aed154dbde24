"""Reconstruction quality against training time on one dataset: the table in the README.

    python benchmarks/reconstruct.py DATASET [--seconds 30,60,120] [--size 128] [--device auto] [--fudan]

DATASET holds transforms_train.json and transforms_test.json; each time budget is a training of its own, since the
learning rate follows the budget.  With --fudan that method (benchmarks/fudan.py) trains as long, beside ours, twice:
with its own schedule, which the time cuts off, and with one fitted to the time.  Writes
benchmarks/results/reconstruct_<name>_<size>[_fudan][_cuda].json.
"""

from __future__ import annotations

from pathlib import Path

import typer

from d2 import fileio, machine
from d2.recon import benchmark

RESULTS = Path(__file__).parent / "results"
SHOWN = ("psnr", "psnr_foreground", "ssim", "psnr_worst", "psnr_train", "iterations", "gaussians")


def main(dataset: Path, seconds: str = "30,60,120", size: int = 128, device: str = "auto", fudan: bool = False) -> None:
    rows, rivals = {}, {}
    for budget in seconds.split(","):
        result = benchmark.reconstruct(dataset, size, float(budget), device=device)
        rows[budget] = {key: result[key] for key in result if key not in ("machine", "config")}
        print(budget, "s:", {key: result[key] for key in SHOWN}, flush=True)
        if fudan:
            from fudan import compare

            rivals[budget] = compare(dataset, size, float(budget), device)
            for name in ("own_schedule", "fitted_schedule"):
                row = rivals[budget][name]
                print(budget, "s, fudan,", name + ":", {key: row[key] for key in SHOWN}, flush=True)
        record = {
            "dataset": dataset.name,
            "machine": machine.describe(),
            "config": result["config"],
            "seconds": rows,
            **({"fudan": rivals} if fudan else {}),
        }
        where = "_fudan" * fudan + "_cuda" * (machine.choose_device(device).type == "cuda")
        fileio.write_json(RESULTS / f"reconstruct_{dataset.name}_{size}{where}.json", record)


if __name__ == "__main__":
    typer.run(main)
