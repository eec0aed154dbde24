"""Full size on a GPU, random weights: seconds a step, peak memory, the share of 800 TFLOP/s, what each choice gains.

    python benchmarks/full_size.py --out full_size.json [--device cuda] [--minutes 9]

Each case is timed on single lines of 21 × 25 at 72² and scaled to a step of 25 columns and 21 rows; each result is
written at once, and the same command goes on with the cases that lack one, so that it may be called in pieces of
--minutes.  `reference` is the reference's arithmetic: float16 (without the casts of its autocast, which favours it),
the 3 rows of one of its GPUs at once in one batch of guidance pairs, cross-attention computed in every evaluation.
The step cache's seconds are the mean over a whole evaluation and those that reuse it; what it keeps of all lines is
counted, not measured.  Caps are a limit of this process's memory on a GPU, also where a row is drawn and a reference
looked at.  `--size 64` makes everything small, for a look on a CPU, where nothing is capped or compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unet_speed import peak_mb, random_network, random_unet, synchronise

from d2 import budget, machine
from d2.config import load, preset_path
from d2.denoiser import Lines, UNetDenoiser
from d2.fileio import read_json, write_json
from d2.models.blocks import FeedForward
from d2.models.conditioner import Conditioning
from d2.models.offload import Offload
from d2.models.weights import build
from d2.pair import AXES, Execution, Model
from d2.settings import GenerateConfig

WHOLE, SHALLOW = 10.0, 9.0  # noise levels, the second of which reuses what the first computed
PEAK = 800e12  # FLOP/s in bfloat16, the limit of an H100 that specifications count with
BF16 = Execution(torch.bfloat16)
LOW = Execution(torch.bfloat16, offload=True, halves=True, feed_forward_chunk=16384)
CASES: dict[str, tuple[Execution, dict[str, Any]]] = {
    "full": (BF16, {}),
    "float32": (Execution(), {}),
    "channels_last": (dataclasses.replace(BF16, channels_last=True), {}),
    "compile_kernels": (dataclasses.replace(BF16, compile="kernels"), {}),
    "compile_graph": (dataclasses.replace(BF16, compile="graph"), {}),
    "two_in_flight": (BF16, {"in_flight": 2}),
    "no_cached_context": (BF16, {"cached": False}),
    "unguided": (BF16, {"guided_from": 0.0}),
    "step_cache_2": (BF16, {"step_cache": 2}),
    "step_cache_3": (BF16, {"step_cache": 3}),
    "step_cache_2_compile_graph": (dataclasses.replace(BF16, compile="graph"), {"step_cache": 2}),
    "offload": (dataclasses.replace(BF16, offload=True), {}),
    "halves": (dataclasses.replace(BF16, halves=True), {}),
    "reference": (Execution(torch.float16), {"in_flight": 3, "cached": False}),
    "low_vram_8_gb": (LOW, {"cap": 8e9}),
    "low_vram_12_gb_without_chunks": (dataclasses.replace(LOW, feed_forward_chunk=0), {"cap": 12e9}),
}
evaluation = functools.cache(budget.evaluation)
AROUND = "low_vram_8_gb_around"  # the case of what comes before and after sampling


class Uncached(UNetDenoiser):
    """Projects the context in every evaluation, as the reference does."""

    def prepare(self, cond: Conditioning) -> Conditioning:
        return cond

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self.estimate(x, sigma, self.look(cond))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times every way to run the full-size pair on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the record, which is gone on with where it is there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case is begun after that")
    parser.add_argument("--repeat", type=int, default=3, help="lines that are timed, of which the fastest counts")
    parser.add_argument("--size", type=int, default=0, help="other pictures than 576², with smaller networks")
    args = parser.parse_args(argv)
    begin, device = time.monotonic(), torch.device(args.device)
    settings = GenerateConfig() if not args.size else small(args.size)
    record = read_json(args.out) if args.out.exists() else {"machine": machine.describe(), "cases": {}}
    left = [name for name in (*CASES, AROUND) if name not in record["cases"]]
    for name in left:
        if time.monotonic() - begin > 60 * args.minutes:
            print(f"{len(left)} cases are left: repeat the same command")
            return 0
        how, options = CASES.get(name, (LOW, {"cap": 8e9}))
        if device.type != "cuda" and how.compile != "off":
            found: dict[str, Any] = {"skipped": "needs a GPU"}
        elif name == AROUND:
            found = around(settings, device, **options)
        else:
            found = measure(settings, how, device, args.repeat, **options)
        record["cases"][name] = found
        left = left[1:]
        print(name, json.dumps(found), flush=True)
        write_json(args.out, record)
    summary(record)
    write_json(args.out, record)
    return 0


def small(size: int) -> GenerateConfig:
    """The same kinds of layers, few and narrow."""
    few = {"unet_channels": 32, "unet_mult": (1, 2), "unet_blocks": 1, "unet_attention": (1, 2), "unet_head": 16}
    few |= {"clip_size": 32, "clip_patch": 8, "clip_width": 32, "clip_layers": 1, "clip_heads": 2, "vae_channels": 32}
    return GenerateConfig(**few, clip_output=24, embedding=8, views=3, frames=4, size=size, steps=3, vrs_steps=1)


def measure(
    settings: GenerateConfig, how: Execution, device: torch.device, repeat: int, cap: float = 0.0, **options: Any
) -> dict[str, Any]:
    """A step's seconds and the peak memory; what did not fit is said."""
    found: dict[str, Any] = {}
    models: tuple[Model, ...] = ("view", "frame")
    with capped(device, cap, found):
        for model in models:
            found[f"{model}_line_seconds"] = line_seconds(settings, model, how, device, repeat, **options)
    if "out_of_memory" in found:
        return found
    step = settings.frames * found["view_line_seconds"] + settings.views * found["frame_line_seconds"]
    pair = Execution(how.dtype, halves="guided_from" in options)  # without guidance there is one half
    each: dict[Model, budget.Evaluation] = {model: evaluation(settings, model, pair) for model in models}
    n = options.get("step_cache", 1)
    line = {model: (e.flops + (n - 1) * e.reusing) / n for model, e in each.items()}
    flops = settings.frames * line["view"] + settings.views * line["frame"]
    found |= {"step_seconds": step, "run_minutes": (settings.steps + settings.vrs_steps) * step / 60}
    kept = budget.step_cache(dataclasses.replace(settings, step_cache=n), pair, each)
    return found | {"share_of_limit": flops / step / PEAK, "step_cache_mb": kept / 2**20}


@contextlib.contextmanager
def capped(device: torch.device, cap: float, found: dict[str, Any]) -> Iterator[None]:
    """Notes the peak memory of what is done, and whether it was more than `cap` bytes (0: all there is)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole) if cap else 1.0, device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        found["out_of_memory"] = str(error)[:200]
    finally:
        found["peak_mb"] = peak_mb(device)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


@torch.no_grad()
def around(settings: GenerateConfig, device: torch.device, cap: float = 0.0) -> dict[str, Any]:
    """Seconds and memory of drawing a row and of looking at a reference, with low-vram's chunks."""
    chunk = load(GenerateConfig, preset_path("low-vram", "generate")).decode_chunk
    spec, side = settings.spec("frame"), settings.size
    found: dict[str, Any] = {}
    with torch.device("meta"):
        stage, look = build(spec, "first_stage"), build(spec, "conditioner")
    with capped(device, cap, found):
        stage = random_network(stage, device, torch.float32)
        begin = time.perf_counter()
        stage.decode(torch.randn(settings.frames, *settings.latent, device=device), chunk)
        synchronise(device)
        found["row_seconds"] = time.perf_counter() - begin
        del stage
        look = random_network(look, device, torch.float32)
        begin = time.perf_counter()
        look(torch.zeros(1, 3, side, side, device=device), torch.zeros(1, 3, side, side, device=device), 0.02)
        synchronise(device)
        found["reference_seconds"] = time.perf_counter() - begin
    return found


@torch.no_grad()
def line_seconds(
    settings: GenerateConfig,
    model: Model,
    how: Execution,
    device: torch.device,
    repeat: int,
    in_flight: int = 1,
    cached: bool = True,
    guided_from: float = float("inf"),
    step_cache: int = 1,
) -> float:
    """Of one line with its guidance pair, the fastest of some; with `offload` the weights' way there and back too."""
    config, T = settings.spec(model).unet, settings.views if model == "view" else settings.frames
    unet = random_unet(config, torch.device("cpu") if how.offload else device, how.dtype)
    for module in unet.modules():
        if isinstance(module, FeedForward):
            module.chunk = how.feed_forward_chunk
    if how.channels_last:
        for parameter in unet.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    offload = Offload(unet, device) if how.offload else None
    if how.compile != "off":
        unet.compile(mode="reduce-overhead" if how.compile == "graph" else "default")
    c, h, w = settings.latent
    shape = (1, T, c, h, w)
    numbers = config.context_dim, config.adm_in_channels
    conditions = [
        Conditioning(torch.randn(1, T, numbers[0]), torch.randn(shape), torch.randn(1, T, numbers[1]))
        for _ in range(in_flight)
    ]
    conditions = [condition.to(device, how.dtype) for condition in conditions]
    if offload:
        offload.fetch(whole=True)
    denoiser = UNetDenoiser(unet) if cached else Uncached(unet)
    shallow_at = (SHALLOW,) if step_cache > 1 else ()
    lines = Lines(denoiser, conditions, AXES[model], in_flight, guided_from, how.halves, shallow_at)
    x = torch.randn(in_flight, T, c, h, w, device=device)
    x = x if model == "frame" else x.transpose(0, 1)
    times = []
    for _ in range(repeat + (3 if how.compile != "off" else 1)):
        synchronise(device)
        begin = time.perf_counter()
        if offload:
            offload.release()
            offload.fetch()
        for sigma in [WHOLE] + [SHALLOW] * (step_cache - 1):
            lines(x, sigma)
        synchronise(device)
        times.append((time.perf_counter() - begin) / in_flight / step_cache)
    return min(times[-repeat:])


def summary(record: dict[str, Any]) -> None:
    """What each case gains over `full`, and the presets as runs."""
    seconds = {name: case["step_seconds"] for name, case in record["cases"].items() if "step_seconds" in case}
    record["speed_over_full"] = {name: seconds["full"] / value for name, value in seconds.items()} if seconds else {}
    fast = load(GenerateConfig, preset_path("fast", "generate"))
    if "full" in seconds:
        record["fast_run_minutes"] = (fast.steps + fast.vrs_steps) * seconds["full"] / 60
    print(f"{'case':<30} s a step  over full  share of limit  peak GB")
    for name, value in seconds.items():
        case, gain = record["cases"][name], record["speed_over_full"][name]
        print(f"{name:<30} {value:8.3f} {gain:10.2f} {case['share_of_limit']:15.3f} {case['peak_mb'] / 1024:8.1f}")


if __name__ == "__main__":
    sys.exit(main())
