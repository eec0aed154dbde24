"""Reconstruction from pictures that disagree: the plain loss against the robust default, on clean test views.

    python benchmarks/robustness.py DATASET… [--kinds clean,poses,…] [--modes plain,robust,…] [--steps 2000]

Each DATASET holds transforms_train.json and transforms_test.json (clean).  Its training pictures are perturbed, one
kind at a time (benchmarks/perturb.py), and fitted with the same number of steps: `plain` with disagreement=false,
`robust` with what the preset quality does to generated pictures, and every other mode with one tool alone.  A run
folder, such as make_toy_data.py --generated makes, is the real thing: it has one row, "generated".  PSNR and SSIM are
those of the test views; flicker is that of two of the training cameras over all moments, where clean pictures of them
are known.  Writes benchmarks/results/robustness.json as it goes; what is there is kept.
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
from d2.recon import benchmark, dataset, metrics, pipeline, rig, train
from d2.recon.config import ReconstructConfig
from d2.recon.gaussians import Gaussians4D
from d2.run import is_run

RESULTS = Path(__file__).parent / "results" / "robustness.json"
PLAIN = "disagreement=false"
MODES = {
    "plain": (PLAIN,),
    "robust": ("disagreement=true", "refine_rig=true", "correct_poses=true", "correct_times=true"),
    "poses": (PLAIN, "correct_poses=true"),
    "times": (PLAIN, "correct_times=true"),
    "colors": (PLAIN, "correct_colors=true"),
    "blurs": (PLAIN, "correct_blurs=true"),
    "rig": (PLAIN, "refine_rig=true"),
    "fat_03": (PLAIN, "min_scale=0.3"),
    "fat_05": (PLAIN, "min_scale=0.5"),
    "haze": (PLAIN, "haze_weight=0.1"),
    "opacity": (PLAIN, "opacity_weight=0.05"),
    "charbonnier": (PLAIN, "charbonnier=0.05"),
    "trim": (PLAIN, "trim=0.02"),
    "opacity_reset": (PLAIN, "opacity_reset_every=400"),
}
WATCHED = 2  # cameras that flicker is measured from
MEASURED = "psnr", "psnr_foreground", "ssim", "psnr_worst"


def main(
    datasets: list[Path],
    kinds: str = ",".join(["clean", *KINDS]),
    modes: str = "plain,robust",
    steps: int = 2000,
    size: int = 128,
    out: Path = RESULTS,
) -> None:
    record: dict[str, Any] = fileio.read_json(out, fileio.MB) if out.is_file() else {"rows": {}}
    for folder in datasets:
        for kind in ["generated"] if is_run(folder) else kinds.split(","):
            row = record["rows"].setdefault(folder.name, {}).setdefault(kind, {})
            for mode in modes.split(","):
                if mode not in row:
                    row[mode] = measured(folder, kind, mode, steps, size)
                    print(folder.name, kind, mode, row[mode], flush=True)
            record |= {"steps": steps, "size": size, "machine": machine.describe(), "gains": gains(record["rows"])}
            fileio.write_json(out, record)
    print(record["gains"])


def measured(folder: Path, kind: str, mode: str, steps: int, size: int) -> dict[str, Any]:
    """One fit of one perturbed dataset and its quality on the clean test views."""
    settings = configuration.load(ReconstructConfig, "fast", sets=(f"iterations={steps}", *MODES[mode]))
    settings = pipeline.settled(settings, generated=False)
    data, test = (dataset.load(folder, split, None if kind == "generated" else size) for split in ("train", "test"))
    data, test = data.on(torch.ones(3)), test.on(torch.ones(3))
    clean = data
    if kind in KINDS:
        data = perturb(data, kind)
    found: dict[str, Any] = {}
    with pipeline.kernel_threads():
        if settings.refine_rig:
            seen = int(data.views.max()) if kind == "generated" else 0  # the input's view
            data, rig_found = rig.refine(data, settings, int((data.views == seen).nonzero()[0]))
            found = {"rig": rig_found.as_dict()}
        model = train.fit(train.start(data, settings, "cpu"), data, settings)
        scores = benchmark.measure(model, test, settings)
        if kind != "generated":  # whose own pictures flicker
            found["flicker"] = round(flicker_of(model, clean, settings), 5)
    return {name: scores[name] for name in MEASURED} | found


@torch.no_grad()
def flicker_of(model: Gaussians4D, clean: dataset.Dataset, settings: ReconstructConfig) -> float:
    """metrics.over_time's, from the first camera and those evenly spaced after it."""
    views = torch.linspace(0, int(clean.views.max()) + 1, WATCHED + 1)[:-1].long()
    videos = []
    for view in views.tolist():
        cells = (clean.views == view).nonzero()[:, 0]
        cells = cells[clean.times[cells].argsort()].tolist()
        drawn = torch.stack([train.draw_cell(model, clean, k, settings.antialiased) for k in cells])
        videos.append((drawn.permute(0, 3, 1, 2), clean.images[cells].permute(0, 3, 1, 2) / 255))
    return metrics.over_time(videos)["flicker"]


def gains(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each mode gains over the plain loss in dB, averaged over datasets: clean, perturbed and generated ones."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, row in ((kind, row) for kinds in rows.values() for kind, row in kinds.items() if "plain" in row):
        for mode in row.keys() - {"plain"}:
            gain = row[mode]["psnr"] - row["plain"]["psnr"]
            found.setdefault(mode, {}).setdefault("perturbed" if kind in KINDS else kind, []).append(gain)
    return {
        mode: {group: round(statistics.fmean(values), 3) for group, values in groups.items()}
        for mode, groups in sorted(found.items())
    }


if __name__ == "__main__":
    typer.run(main)
