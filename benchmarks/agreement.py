"""Whether two rasterizers agree on moving Gaussians, in picture and gradients: gsplat on CUDA against our CPU kernels.

    python benchmarks/agreement.py [--device cuda] [--count 5000] [--size 128]

Prints one JSON line for each quantity and exits with 1 when a relative difference exceeds 1e-3.  With
`--device cpu` our kernels are held against the dense float64 twin instead; take a small count and size then.
"""

from __future__ import annotations

import json
import math

import torch
import typer
from torch import Tensor

from d2 import camera, machine
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import BackendName, image_plane_gradient, rasterize
from d2.recon.raster.gsplat import version

TOLERANCE = 1e-3  # of the largest value
VIEWS = 4  # (view, time) pairs in one call


def main(device: str = "cuda", count: int = 5000, size: int = 128, sh_degree: int = 1) -> None:
    place = machine.choose_device(device)
    if place.type == "cuda":
        typer.echo(json.dumps({"gsplat": version()} | machine.describe()))
    other = draw(scene(count, sh_degree), "auto" if place.type == "cuda" else "reference", place, size)
    ours = draw(scene(count, sh_degree), "cpu", torch.device("cpu"), size)
    worst = 0.0
    for name, value in ours.items():
        difference = float((other[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-12))
        worst = max(worst, difference) if math.isfinite(difference) else math.inf
        typer.echo(json.dumps({"check": name, "max_rel_err": difference, "ok": difference <= TOLERANCE}))
    raise typer.Exit(0 if worst <= TOLERANCE else 1)


def scene(count: int, sh_degree: int) -> Gaussians4D:
    """A cloud of moving Gaussians about as large as an object fills a picture."""
    g = torch.Generator().manual_seed(0)
    return Gaussians4D(
        means=0.4 * torch.randn(count, 3, generator=g),
        velocities=0.2 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g),
        log_durations=torch.log(0.2 + torch.rand(count, generator=g)),
        quats=torch.randn(count, 4, generator=g),
        log_scales=0.3 * torch.randn(count, 3, generator=g) + math.log(1.5 / count ** (1 / 3)) - 1,
        opacity_logits=torch.randn(count, generator=g),
        sh=0.3 * torch.randn(count, (sh_degree + 1) ** 2, 3, generator=g),
    )


def draw(gaussians: Gaussians4D, backend: BackendName, place: torch.device, size: int) -> dict[str, Tensor]:
    """Picture, alpha and the gradient of every raw parameter under fixed random weights, on the CPU."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    leaves = gaussians.map(lambda x: x.to(place, dtype).requires_grad_())
    rig = camera.orbit(VIEWS, width=size, height=size)
    views = torch.from_numpy(rig.viewmats).to(place, dtype)
    Ks = torch.from_numpy(rig.K).to(place, dtype).expand(VIEWS, 3, 3)
    drawn, motion = leaves.activated(torch.linspace(0, 1, VIEWS, device=place, dtype=dtype))
    image, alpha, meta = rasterize(
        drawn["means"], drawn["quats"], drawn["scales"], drawn["opacities"], drawn["colors"], views, Ks,
        size, size, sh_degree=gaussians.sh_degree, motion=motion,
        backgrounds=torch.full((VIEWS, 3), 0.3, device=place, dtype=dtype), backend=backend,
    )  # fmt: skip
    weights = torch.rand(image.shape, generator=torch.Generator().manual_seed(1)).to(place, dtype)
    ((image * weights).sum() + (alpha * weights[..., :1]).sum()).backward()
    found = {"image": image, "alpha": alpha, "gradient of means2d": image_plane_gradient(meta)}
    found |= {
        f"gradient of {name}": tensor.grad for name, tensor in leaves.tensors().items() if tensor.grad is not None
    }
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


if __name__ == "__main__":
    typer.run(main)
