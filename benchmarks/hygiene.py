"""Whether a long process stays as it was: memory, open files and threads over many iterations and several assets.

    python benchmarks/hygiene.py [--iterations 10000] [--assets 5] [--out FILE]

One reconstruction of so many iterations, looked at twenty times; then so many assets, each generated, reconstructed and
exported.  The first half may warm up; after it memory may grow by 32 MB, files and threads not at all.  Exits with 1
when something grows.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import typer
from crash import one_thread
from stages import SETS, STAGES, Reconstruct

from d2 import fileio, machine
from d2.recon import pipeline, train

GROWTH = 32.0  # MB
LOOKS = 20


class Look(NamedTuple):
    """What the process holds."""

    memory: float  # MB resident
    files: int
    threads: int


def main(iterations: int = 10000, assets: int = 5, out: Path | None = None) -> None:
    one_thread()
    with tempfile.TemporaryDirectory(prefix="d2-hygiene-") as place:
        record = {
            "iterations": {"count": iterations, **grown(many_iterations(Path(place) / "one", iterations))},
            "assets": {"count": assets, **grown(many_assets(Path(place) / "many", assets))},
        }
    print(record)
    if out is not None:
        fileio.write_json(out, {"machine": machine.describe()} | record)
    raise SystemExit(0 if all(entry["flat"] for entry in record.values()) else 1)


def many_iterations(place: Path, count: int) -> list[Look]:
    """A long reconstruction of a tiny scene."""
    stage = Reconstruct(place)
    stage.prepare()
    looks: list[Look] = []

    class Watch(pipeline.Observer):
        def progress(self, progress: train.Progress, best_psnr: float | None) -> None:
            if progress.iteration % max(1, count // LOOKS) == 0:
                looks.append(look())

    sets = (*SETS, f"iterations={count}", f"validate_every={max(1, count // 4)}")
    pipeline.reconstruct(place / "source", place / "out", sets=sets, device="cpu", observer=Watch())
    return looks


def many_assets(place: Path, count: int) -> list[Look]:
    """One after the other, everything in this process."""
    stages = [kind(place / name) for name, kind in STAGES.items()]
    for stage in stages:
        stage.prepare()
    looks = []
    for k in range(count):
        for stage in stages:
            stage.work(place / f"{type(stage).__name__}{k}")
        looks.append(look())
    return looks


def look() -> Look:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / fileio.MB
    tasks = len(os.listdir("/proc/self/task"))
    return Look(memory, len(os.listdir("/proc/self/fd")), max(tasks, threading.active_count()))


def grown(looks: list[Look]) -> dict[str, Any]:
    """What grew since the first half."""
    warm, end = looks[len(looks) // 2], looks[-1]
    grown = {
        "megabytes": round(end.memory - warm.memory, 1),
        "files": end.files - warm.files,
        "threads": end.threads - warm.threads,
    }
    flat = grown["megabytes"] <= GROWTH and grown["files"] <= 0 and grown["threads"] <= 0
    return {"grown": grown, "resident_megabytes": round(end.memory), "flat": flat}


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        sys.exit("needs /proc: Linux")
    typer.run(main)
