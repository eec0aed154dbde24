"""Times the full-size UNets with random weights on one line of the matrix: seconds, memory, TFLOP/s.

    python benchmarks/unet_speed.py --model svd --device cuda --dtype bf16 [--compile] [--out FILE.json]

One evaluation is one row (svd: 25 frames) or one column (sv3d: 21 views) with its guidance pair, as the
sampler asks for it.  On a 2-core CPU in float32 it takes 15 to 40 minutes; `--latent 16` gives a quick look.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2.denoiser import Lines, UNetDenoiser
from d2.fileio import write_json
from d2.models.conditioner import Conditioning
from d2.models.unet import SV3D_P, SVD_XT, UNetConfig, VideoUNet

MODELS: dict[str, tuple[UNetConfig, int, Literal["rows", "columns"]]] = {
    "svd": (SVD_XT, 25, "rows"),
    "sv3d": (SV3D_P, 21, "columns"),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times one evaluation of a full-size UNet.")
    parser.add_argument("--model", choices=list(MODELS), default="svd")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--latent", type=int, default=72, help="height and width of the latents")
    parser.add_argument("--repeat", type=int, default=1, help="evaluations that are timed")
    parser.add_argument("--warm-up", type=int, default=0, help="evaluations before those")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--out", type=Path, help="also writes the result as JSON")
    args = parser.parse_args(argv)
    result = measure(args)
    print(json.dumps(result))
    if args.out:
        write_json(args.out, result)
    return 0 if result["finite"] else 1


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict:
    config, T, axis = MODELS[args.model]
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    unet = random_unet(config, device, dtype)
    if args.compile:
        unet.compile()
    cond = Conditioning(
        torch.randn(1, T, config.context_dim),
        torch.randn(1, T, config.out_channels, args.latent, args.latent),
        torch.randn(1, T, config.adm_in_channels),
    )
    line = Lines(UNetDenoiser(unet), [cond.to(device, dtype)], axis)
    x = 10 * torch.randn(T, config.out_channels, args.latent, args.latent, device=device)
    x = x[None] if axis == "rows" else x[:, None]
    for _ in range(args.warm_up):
        line(x, 10.0)
    estimates, seconds = [], []
    for _ in range(args.repeat):
        synchronise(device)
        start = time.perf_counter()
        estimates.append(line(x, 10.0))
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    tflop = 2 * T * tflop_per_frame(config, args.latent, T)
    best = min(seconds)
    return {
        "model": args.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "compiled": args.compile,
        "pictures": 2 * T,
        "latent": args.latent,
        "seconds": [round(s, 3) for s in seconds],
        "tflop": round(tflop, 3),
        "tflop_per_s": round(tflop / best, 3),
        "peak_mb": round(peak_mb(device)),
        "finite": all(bool(e.cond.isfinite().all() and e.uncond.isfinite().all()) for e in estimates),
    }


def random_unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> VideoUNet:
    with torch.device("meta"):
        unet = VideoUNet(config)
    return random_network(unet, device, dtype)


def random_network(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network from the meta device whose activations keep a sensible size, made without a float32 copy."""
    network = network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)  # norms; biases, mixes
    return network


def tflop_per_frame(config: UNetConfig, latent: int, T: int) -> float:
    """What one picture of a forward costs; counted on the meta device, nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = VideoUNet(config)
        tokens = unet.project_context(torch.empty(T, config.context_dim), T)
        x = torch.empty(T, config.in_channels, latent, latent)
        unet(x, torch.empty(T), tokens, torch.empty(T, config.adm_in_channels), T)
    return counter.get_total_flops() / T / 1e12


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(device: torch.device) -> float:
    """The most memory that was in use, on the device or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
