"""What sharing out a step costs: bytes and seconds measured on this CPU, and a model on paper of a cluster of GPUs.

    python benchmarks/scaling.py [--out benchmarks/results/scaling.json] [--repeat 5]

Measured with the tiny pair: what moves between rank 0 and the others in a step for 1 to 4 ranks, which must be what
the model says to the byte, and a step's seconds for one rank (on one thread and on all) and two (one thread each).
On paper, for 21 × 25 cells at 72²: the slowest rank's arithmetic at PEAK, what rank 0 sends and receives at the
speed of its links, the references and the decoder.  Nothing of it was run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from d2 import budget, machine
from d2.config import load, preset_path
from d2.fileio import write_json
from d2.launch import gathered
from d2.pair import Execution, Model, Pair, load_models, model_angles
from d2.ranks import LeadingPair, shares
from d2.settings import GenerateConfig

PEAK = 800e12  # FLOP/s of an H100 in bfloat16, the limit that specifications count with
LINKS = {1: 1.0, 8: 100e9, 64: 25e9}  # ranks -> bytes/s in and out of rank 0: within a node, and over 200 Gb/s
DECODER_PEAK = 50e12  # FLOP/s in float32, in which pictures are drawn
TRAILER = 2  # numbers at the end of each answer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The cost of sharing out a step between ranks.")
    parser.add_argument("--out", type=Path, help="also writes the record as JSON")
    parser.add_argument("--repeat", type=int, default=5, help="steps that are timed, of which the fastest counts")
    args = parser.parse_args(argv)
    settings = load(GenerateConfig, preset_path("tiny", "generate"))
    record = {"machine": machine.describe(), "measured": {}, "paper": {}}
    for name, ranks, threads in (("1", 1, 1), ("1_all_threads", 1, 0), ("2", 2, 1), ("3", 3, 1), ("4", 4, 1)):
        record["measured"][name] = measure(settings, ranks, threads, args.repeat)
        print(name, json.dumps(record["measured"][name]))
    seconds = {name: found["seconds"] for name, found in record["measured"].items()}
    record["speedup"] = {
        "2": seconds["1"] / seconds["2"],
        "2_over_all_threads": seconds["1_all_threads"] / seconds["2"],
    }
    record["paper"] = {str(ranks): on_paper(GenerateConfig(), ranks) for ranks in LINKS}
    print(json.dumps({"speedup": record["speedup"], "paper": record["paper"]}, indent=1))
    if args.out:
        write_json(args.out, record)
    return 0


def measure(settings: GenerateConfig, ranks: int, threads: int, repeat: int) -> dict[str, Any]:
    """One step of both models on the CPU; raises AssertionError where other bytes move than the model says."""
    torch.set_num_threads(threads * ranks if threads else machine.available_cores())
    with gathered(load_models(settings), settings, ranks) as pair:
        views, frames = (lines(pair, model, settings) for model in ("view", "frame"))
        x = torch.randn(settings.views, settings.frames, *settings.latent)
        times, moved = [], 0
        for _ in range(repeat + 1):  # the first one warms up
            before = pair.group.moved if isinstance(pair, LeadingPair) else 0
            begin = time.perf_counter()
            pair.together(views, frames, x, 10.0)
            times.append(time.perf_counter() - begin)
            moved = pair.group.moved - before if isinstance(pair, LeadingPair) else 0
    expected = traffic(settings, ranks, members=1)  # the tiny pair knows no guidance
    assert moved == expected, f"{moved} bytes moved, the model says {expected}"
    return {"seconds": min(times[1:]), "bytes": moved, "threads": threads or machine.available_cores()}


def lines(pair: Pair, model: Model, settings: GenerateConfig) -> Any:
    """All columns or rows, on white references."""
    c = settings
    count, angles = (c.frames if model == "view" else c.views), model_angles(c.views)
    vector = (
        pair.view_vector(torch.zeros(c.views, dtype=torch.float64), angles, c.cond_aug_view)
        if model == "view"
        else pair.frame_vector(c.fps_id, c.motion, c.cond_aug_frame, c.frames)
    )
    pictures = torch.ones(count, 3, c.size, c.size)
    conditions = pair.conditions(model, pictures, lambda line: torch.zeros(3, c.size, c.size), vector, 0.0)
    return pair.lines(model, conditions, guided_from=0.0)


def spread(settings: GenerateConfig, ranks: int) -> list[int]:
    """Pictures that each rank denoises in a step, those of both models."""
    c = settings
    length: dict[Model, int] = {"view": c.views, "frame": c.frames}
    bundles: dict[Model, list[list[int]]] = {
        "view": [[f] for f in range(c.frames)], "frame": [[v] for v in range(c.views)]
    }  # fmt: skip
    return [sum(length[model] * len(mine) for model, mine in given.items()) for given in shares(bundles, length, ranks)]


def traffic(settings: GenerateConfig, ranks: int, members: int) -> int:
    """Bytes in and out of rank 0 in a step: cells of lines given away, and one or two estimates of each back."""
    channels, h, w = settings.latent
    away = spread(settings, ranks)[1:]
    return 4 * (sum(away) * channels * h * w * (1 + members) + len(away) * TRAILER) if any(away) else 0


def on_paper(settings: GenerateConfig, ranks: int) -> dict[str, float]:
    """Seconds of a whole run and where they go, at the peak rate of every GPU."""
    c, how = settings, Execution(torch.bfloat16)
    flops = budget.evaluation(c, "frame", how).flops / (2 * c.frames)  # of a picture and one member of its pair
    loads = spread(c, ranks)
    evaluations = c.steps + c.vrs_steps
    compute = evaluations * 2 * max(loads) * flops / PEAK
    link = evaluations * traffic(c, ranks, members=2) / LINKS[ranks]
    references = c.steps * 2 * (c.views + c.frames) * flops / PEAK  # one line each, on one rank
    decoder = -(-c.views // ranks) * budget.decoding(c).flops / DECODER_PEAK
    total = compute + link + references + decoder
    return {
        "compute_seconds": compute,
        "link_seconds": link,
        "references_seconds": references,
        "decoder_seconds": decoder,
        "total_seconds": total,
        "megabytes_a_step": traffic(c, ranks, members=2) / 1e6,
        "balance": sum(loads) / ranks / max(loads),
        "busy_ranks": sum(1 for load in loads if load),
    }


if __name__ == "__main__":
    sys.exit(main())
