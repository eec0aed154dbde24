"""Times the CPU rasterizer beside others on identical inputs, and whole training iterations against their targets.

    python benchmarks/rasterize.py [--quick] [--prototype FILE] [--opensplat DIR] [--out FILE]

Medians of interleaved repetitions (ours, another, ours, another …), on one thread and on all.  The prototype is the
numba script that the project started from; it takes covariances and gives gradients on the image plane, so ours does
more.  OpenSplat (AGPL, no part of this project) is compiled from a checkout; its loops run on one thread, and only
sorting and compositing are timed.  An iteration is recon.train.step, with every Gaussian visible at every moment.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from contenders import (
    OPENSPLAT_SOURCE,
    Draw,
    Inputs,
    build_opensplat,
    draw_opensplat,
    draw_ours,
    draw_prototype,
    load_prototype,
)

from d2 import camera, fileio, images, machine
from d2.recon import train
from d2.recon.config import ReconstructConfig
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.pipeline import kernel_threads
from d2.recon.raster import rasterize, sh

ROOT = Path(__file__).resolve().parent.parent
PROTOTYPE = Path(os.environ.get("D2_SHARED", ROOT / "shared")) / "prototypes" / "rasterize_numba.py"
REPEATS, QUICK_REPEATS = 15, 3
STEPS_PER_REPEAT = 3  # training iterations for each repetition of the rasterizers
VIEWS = 7  # cameras of the training iterations
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
PARTS = ("project", "sort", "bin_splats", "composite", "composite_backward", "project_backward", "around")
STEP_PARTS = ("forward", "loss", "backward", "adam", "densify")


class Scene(NamedTuple):
    """How many Gaussians, how large a picture, and what one training iteration may take on two cores."""

    count: int
    size: int  # pixels a side
    target_ms: float | None

    @property
    def name(self) -> str:
        return f"{self.count // 1000}k@{self.size}"


SCENES = (Scene(5000, 128, 12), Scene(20000, 256, 35), Scene(20000, 576, None), Scene(100000, 576, 180))


def main() -> None:
    """Measures, prints the table, writes the record."""
    parser = argparse.ArgumentParser(description="Times the CPU rasterizer and whole training iterations.")
    parser.add_argument("--quick", action="store_true", help="the smallest scene, few repetitions")
    parser.add_argument("--prototype", type=Path, default=PROTOTYPE, metavar="FILE", help="numba script to compare to")
    parser.add_argument("--opensplat", type=Path, metavar="DIR", help="checkout of OpenSplat to compile and compare to")
    parser.add_argument(
        "--out", type=Path, help="JSON record; default benchmarks/results/rasterize.json, none if quick"
    )
    options = parser.parse_args()
    if options.opensplat and not (options.opensplat / OPENSPLAT_SOURCE).is_file():
        parser.error(f"--opensplat: {options.opensplat} holds no {OPENSPLAT_SOURCE}")
    out = options.out or (None if options.quick else ROOT / "benchmarks" / "results" / "rasterize.json")
    record = measure(options.quick, options.prototype, options.opensplat)
    print("\n".join(table(record)))
    if out:
        fileio.write_json(out, record)


def measure(quick: bool, prototype: Path, opensplat: Path | None) -> dict[str, Any]:
    """The whole record: machine, scenes by name, iterations by name; times are medians in milliseconds."""
    scenes, repeats = (SCENES[:1], QUICK_REPEATS) if quick else (SCENES, REPEATS)
    begin, load = time.perf_counter(), round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    rivals: dict[str, Callable[[Inputs], Draw]] = {"ours": draw_ours}
    if prototype.is_file():
        module = load_prototype(prototype)
        rivals["prototype"] = lambda inputs: draw_prototype(module, inputs)
    else:
        print(f"No prototype at {prototype}: skipped; --prototype FILE names one")
    if opensplat:
        extension = build_opensplat(opensplat)
        rivals["opensplat"] = lambda inputs: draw_opensplat(extension, inputs)
    with kernel_threads():
        for rival in rivals.values():
            rival(make_inputs(SCENES[0]))()
        time_iterations(SCENES[0], 1)
        ready = time.perf_counter()
        result = {
            "threads": {"kernels": numba.get_num_threads(), "torch": torch.get_num_threads()},
            "scenes": {scene.name: time_scene(scene, rivals, repeats) for scene in scenes},
            "iterations": {s.name: time_iterations(s, repeats * STEPS_PER_REPEAT) for s in scenes if s.target_ms},
        }
    return {
        "machine": machine.describe(),
        "load": load,  # mean number of running processes before: above 0, others took part of the processor
        "repeats": repeats,
        "rivals": list(rivals),
        "compile_seconds": round(ready - begin, 2),
        "seconds": round(time.perf_counter() - ready, 2),
    } | result


def time_scene(scene: Scene, rivals: dict[str, Callable[[Inputs], Draw]], repeats: int) -> dict[str, Any]:
    """Medians by thread count and rival, what ours takes as a multiple of each, and how far the pictures differ."""
    inputs = make_inputs(scene)
    draws = {name: rival(inputs) for name, rival in rivals.items()}
    first = {name: draw() for name, draw in draws.items()}
    result: dict[str, Any] = {"gaussians": scene.count, "size": scene.size, "difference": {}, "threads": {}}
    for name in list(draws)[1:]:
        g = first["ours"].gradient
        result["difference"][name] = {
            "image": float((first["ours"].image - first[name].image).abs().max()),
            "gradient": float((g - first[name].gradient).abs().max() / g.abs().max()),  # relative to the largest
        }
    for threads in sorted({1, numba.get_num_threads()}):
        used = {name: draw for name, draw in draws.items() if name != "opensplat" or threads == 1}
        with numba_threads(threads):
            ms = interleaved(used, repeats)
        ratios = {
            name: {part: round(ms["ours"][part] / ms[name][part], 3) for part in ("forward", "backward", "total")}
            for name in used
            if name != "ours"
        }
        result["threads"][str(threads)] = {"ms": ms, "ours_over": ratios}
    return result


def interleaved(draws: dict[str, Draw], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by rival and part; taking turns spreads a busy moment of the machine over all."""
    log: dict[str, list[dict[str, float]]] = {name: [] for name in draws}
    for _ in range(repeats):
        for name, draw in draws.items():
            seconds = draw().seconds
            log[name].append(seconds | {"total": seconds["forward"] + seconds["backward"]})
    return {name: medians(rows) for name, rows in log.items()}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds by part, from seconds by part of many repetitions."""
    return {part: round(1e3 * statistics.median(row[part] for row in rows), 3) for part in rows[0]}


@contextlib.contextmanager
def numba_threads(count: int) -> Iterator[None]:
    """So many threads for numba within, and as before after."""
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


# -- scenes ----------------------------------------------------------------------------------------------


def surfels(count: int) -> dict[str, Any]:
    """A bumpy sphere of overlapping flat Gaussians, a tenth of them inside it, in random order."""
    rng = np.random.default_rng(count)
    index = rng.permutation(count)
    height, turn = 1 - (2 * index + 1) / count, GOLDEN_ANGLE * index
    normal = np.stack([np.cos(turn), np.sin(turn), height], -1)
    normal[:, :2] *= np.sqrt(1 - height**2)[:, None]
    radius = 0.85 + 0.1 * np.cos(5 * normal).prod(-1)
    radius *= np.where(rng.random(count) < 0.1, rng.random(count) ** (1 / 3), 1)
    # The rotation that takes +z to the normal, so that the third axis is the thin one.
    quats = np.stack([1 + normal[:, 2], -normal[:, 1], normal[:, 0], np.zeros(count)], -1)
    spacing = 0.85 * math.sqrt(4 * math.pi / count)
    arrays = {
        "means": radius[:, None] * normal,
        "quats": quats / np.linalg.norm(quats, axis=-1, keepdims=True),
        "scales": spacing * np.array([0.7, 0.7, 0.2]) * rng.lognormal(0, 0.4, (count, 3)),
        "opacities": rng.triangular(0.02, 0.9, 0.99, count),
        "colors": 0.5 + 0.4 * np.sin(7 * normal + rng.normal(0, 0.3, (count, 3))),
    }
    return {name: torch.from_numpy(array).float() for name, array in arrays.items()}


def make_inputs(scene: Scene) -> Inputs:
    """The scene before one camera, with random gradients of picture and alpha."""
    rig = camera.orbit(1, width=scene.size, height=scene.size)
    random = torch.Generator().manual_seed(scene.count)
    return Inputs(
        surfels(scene.count), torch.from_numpy(rig.viewmats[0]).float(), torch.from_numpy(rig.K).float(), scene.size,
        torch.randn(scene.size, scene.size, 3, generator=random),
        torch.randn(scene.size, scene.size, generator=random),
    )  # fmt: skip


# -- whole iterations --------------------------------------------------------------------------------------


def time_iterations(scene: Scene, steps: int) -> dict[str, Any]:
    """Median milliseconds of recon.train.step by part, on all threads; the learning rates are the real ones."""
    state, data, config = train.state_of(moving(scene), half_side=1.0), pictures(scene), ReconstructConfig()
    rows = []
    for k in range(steps + 2):
        state.seconds = {}
        train.step(state, data, config, fraction=0.0)
        if k >= 2:  # the first two allocate Adam's moments and warm the caches
            rows.append(state.seconds | {"total": sum(state.seconds.values())})
    return {"threads": numba.get_num_threads(), "target_ms": scene.target_ms, "ms": medians(rows)}


def moving(scene: Scene) -> Gaussians4D:
    """The scene with small velocities; each Gaussian lasts so long that it is visible throughout."""
    g, random = surfels(scene.count), torch.Generator().manual_seed(scene.size)
    return Gaussians4D(
        means=g["means"], velocities=0.05 * torch.randn(scene.count, 3, generator=random),
        times=torch.rand(scene.count, generator=random), log_durations=torch.zeros(scene.count),
        quats=g["quats"], log_scales=g["scales"].log(), opacity_logits=g["opacities"].logit(),
        sh=sh.rgb_to_sh0(g["colors"])[:, None],
    )  # fmt: skip


@torch.no_grad()
def pictures(scene: Scene) -> Dataset:
    """The scene at rest, seen from around at as many moments: what the iterations fit to."""
    rig = camera.orbit(VIEWS, width=scene.size, height=scene.size)
    viewmats = torch.from_numpy(rig.viewmats).float()
    Ks = torch.from_numpy(rig.K).float().repeat(VIEWS, 1, 1)
    image, alpha, _ = rasterize(**surfels(scene.count), viewmats=viewmats, Ks=Ks, width=scene.size, height=scene.size)
    rgba = torch.from_numpy(images.to_uint8(torch.cat([image, alpha], -1).numpy()))
    names = tuple(f"view {v}" for v in range(VIEWS))
    moments = torch.linspace(0, 1, VIEWS)
    return Dataset(rgba, viewmats, Ks, moments, torch.arange(VIEWS), True, torch.ones(3), True, names)


# -- the table ---------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines that show the record."""
    m = record["machine"]
    yield (
        f"{m['cpu']}, {m['cores']} cores, load {record['load']} before; kernels may use "
        f"{record['threads']['kernels']} threads, torch {record['threads']['torch']}"
    )
    yield f"Medians of {record['repeats']} interleaved repetitions in ms; ×: ours as a multiple of that one"
    for name, scene in record["scenes"].items():
        for other, by in scene["difference"].items():
            yield f"{name}: {other}'s picture differs by {by['image']:.1e}, its gradient by {by['gradient']:.1e}"
    yield f"{'scene':>9} {'threads':>7} {'who':>9} {'forward':>9} {'backward':>9} {'total':>9} {'×':>6}"
    for name, scene in record["scenes"].items():
        for threads, entry in scene["threads"].items():
            for who, ms in entry["ms"].items():
                ratio = f"{entry['ours_over'][who]['total']:6.2f}" if who in entry["ours_over"] else ""
                times = " ".join(f"{ms[part]:9.2f}" for part in ("forward", "backward", "total"))
                yield f"{name:>9} {threads:>7} {who:>9} {times} {ratio}".rstrip()
    yield "Ours by part; around: torch, checks and copies about the kernels"
    yield f"{'scene':>9} {'threads':>7} " + " ".join(f"{part:>{max(9, len(part))}}" for part in PARTS)
    for name, scene in record["scenes"].items():
        for threads, entry in scene["threads"].items():
            values = (f"{entry['ms']['ours'][part]:{max(9, len(part))}.2f}" for part in PARTS)
            yield f"{name:>9} {threads:>7} " + " ".join(values)
    yield f"{'iteration':>9} {'threads':>7} " + " ".join(f"{part:>9}" for part in (*STEP_PARTS, "total", "target"))
    for name, entry in record["iterations"].items():
        values = " ".join(f"{entry['ms'][part]:9.2f}" for part in (*STEP_PARTS, "total"))
        yield f"{name:>9} {entry['threads']:>7} {values} {entry['target_ms']:9.0f}"


if __name__ == "__main__":
    main()
