"""What the step cache gains and costs: CPU seconds of the joint loop and PSNR to the run without it, tiny pair.

    python benchmarks/step_cache.py --work DIR [--out benchmarks/results/step_cache.json]

The same picture is generated from each seed with all 20 steps whole, with every 2nd and every 3rd whole, and, for the
same work as every 2nd or 3rd, with 10 and 7 steps.  Beside it, counted: arithmetic and memory at 21 × 25 and 576².
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import d2
from d2 import budget, machine
from d2.fileio import write_json
from d2.pair import Execution, Model
from d2.phases import Observer
from d2.run import Run
from d2.settings import GenerateConfig

PICTURE = Path(__file__).resolve().parent.parent / "tests/data/toy.png"
CASES = {
    "whole": (),
    "every_2nd": ("step_cache=2",),
    "every_3rd": ("step_cache=3",),
    "10_steps": ("steps=10",),
    "7_steps": ("steps=7",),
}


class Clock(Observer):
    """CPU seconds from the joint loop's begin to its end."""

    begin = end = 0.0

    def phase(self, name: str, done: int, total: int) -> None:
        if name == "matrix":
            self.end = time.process_time()
            self.begin = self.end if done == 0 else self.begin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The step cache's trade of time against likeness.")
    parser.add_argument("--work", type=Path, required=True, help="where runs are made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[23, 24, 25])
    parser.add_argument("--out", type=Path, help="also writes the record as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: {"seconds": [], "psnr": []} for name in CASES}
    counted, record = full_size(), {}
    for seed in args.seeds:
        pictures: dict[str, np.ndarray] = {}
        for name, sets in CASES.items():
            clock, home = Clock(), args.work / f"{name}-{seed}"
            sets = (*sets, f"seed={seed}")
            d2.generate(PICTURE, home, preset="tiny", sets=sets, device="cpu", observer=clock, overwrite=True)
            matrix = Run.open(home).matrix()
            pictures[name] = matrix.tensor(list(range(matrix.views)), list(range(matrix.frames))).numpy()
            found[name]["seconds"].append(clock.end - clock.begin)
            if name != "whole":
                error = float(((pictures[name] - pictures["whole"]) ** 2).mean())
                found[name]["psnr"].append(-10 * float(np.log10(error)))
            print(seed, name, found[name], flush=True)
        record = {"machine": machine.describe(), "cases": summary(found), "full_size": counted}
        if args.out:
            write_json(args.out, record)
    print(record)
    return 0


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of each case the fastest run's CPU seconds, how much faster that is, and the mean PSNR."""
    fastest = {name: min(case["seconds"]) for name, case in found.items()}
    return {
        name: {
            "cpu_seconds": fastest[name],
            "speed": fastest["whole"] / fastest[name],
            "psnr": float(np.mean(case["psnr"])) if case["psnr"] else None,
            "runs": len(case["seconds"]),
        }
        for name, case in found.items()
    }


def full_size() -> dict[str, Any]:
    """Counted for the official pair in bfloat16, both halves of each guidance pair."""
    settings, how = GenerateConfig(), Execution(torch.bfloat16)
    models: tuple[Model, ...] = ("view", "frame")
    each: dict[Model, budget.Evaluation] = {model: budget.evaluation(settings, model, how) for model in models}
    line: dict[Model, int] = {model: found.flops for model, found in each.items()}
    reusing: dict[Model, int] = {model: found.reusing for model, found in each.items()}
    petaflop = {}
    for n in (1, 2, 3):
        cached = dataclasses.replace(settings, step_cache=n)
        petaflop[str(n)] = budget.joint_loop(cached, line, 1, reusing)[0] / 1e15
    return {
        "share_of_an_evaluation": reusing["frame"] / line["frame"],
        "petaflop": petaflop,
        "memory_gb": budget.step_cache(dataclasses.replace(settings, step_cache=2), how, each) / budget.GB,
    }


if __name__ == "__main__":
    sys.exit(main())
