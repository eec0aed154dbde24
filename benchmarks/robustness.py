"""Reconstruction from pictures that disagree: the plain loss against the robust default, on clean test views.

    python benchmarks/robustness.py DATASET… [--kinds clean,poses,…] [--steps 4000] [--size 128]

Each DATASET holds transforms_train.json and transforms_test.json (clean).  Its training pictures are perturbed, one
kind at a time (benchmarks/perturb.py), and fitted twice with the same number of steps: with `disagreement=false` and
with `disagreement=true`, what d2 reconstruct does with pictures that a model made.  PSNR and SSIM are those of the
test views.  Writes benchmarks/results/robustness.json as it goes; rows that are there are kept.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import typer
from perturb import KINDS, perturb

from d2 import config as configuration
from d2 import fileio, machine
from d2.recon import benchmark, dataset, pipeline, rig, train
from d2.recon.config import ReconstructConfig

RESULTS = Path(__file__).parent / "results" / "robustness.json"
MODES = {"plain": "disagreement=false", "robust": "disagreement=true"}
MEASURED = "psnr", "psnr_foreground", "ssim", "psnr_worst"


def main(
    datasets: list[Path],
    kinds: str = ",".join(["clean", *KINDS]),
    steps: int = 4000,
    size: int = 128,
    out: Path = RESULTS,
) -> None:
    record: dict[str, Any] = fileio.read_json(out, fileio.MB) if out.is_file() else {"rows": {}}
    for folder in datasets:
        for kind in kinds.split(","):
            row = record["rows"].setdefault(f"{folder.name} {kind}", {})
            for mode in MODES:
                if mode not in row:
                    row[mode] = measured(folder, kind, mode, steps, size)
                    print(folder.name, kind, mode, row[mode], flush=True)
            row["gain"] = round(row["robust"]["psnr"] - row["plain"]["psnr"], 3)
            record |= {"steps": steps, "size": size, "machine": machine.describe(), "mean": means(record["rows"])}
            fileio.write_json(out, record)
    print(record["mean"])


def measured(folder: Path, kind: str, mode: str, steps: int, size: int) -> dict[str, Any]:
    """One fit of one perturbed dataset and its quality on the clean test views."""
    settings = configuration.load(ReconstructConfig, "quality", sets=(f"iterations={steps}", MODES[mode]))
    settings = pipeline.settled(settings, generated=False)
    data, test = dataset.load(folder, "train", size), dataset.load(folder, "test", size)
    test = test.on(torch.ones(3))
    if kind != "clean":
        data = perturb(data, kind)
    found: dict[str, Any] = {}
    with pipeline.kernel_threads():
        if settings.refine_rig:
            data, rig_found = rig.refine(data, settings, 0)
            found = {"rig": rig_found.as_dict()}
        model = train.fit(train.start(data, settings, "cpu"), data, settings)
        scores = benchmark.measure(model, test, settings)
    return {name: scores[name] for name in MEASURED} | found


def means(rows: dict[str, Any]) -> dict[str, float]:
    """What the robust default costs on clean pictures and gains on the others, in dB, averaged over datasets."""
    clean = [row["gain"] for name, row in rows.items() if name.endswith(" clean") and "gain" in row]
    others = [row["gain"] for name, row in rows.items() if not name.endswith(" clean") and "gain" in row]
    groups = {"clean": clean, "perturbed": others}
    return {name: round(statistics.fmean(gains), 3) for name, gains in groups.items() if gains}


if __name__ == "__main__":
    typer.run(main)
