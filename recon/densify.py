"""Prune and grow: what nobody sees goes, and where the image-plane gradient is largest Gaussians are added."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2.recon.gaussians import Gaussians4D
from d2.recon.raster.reference import rotation_matrices

SPLIT_SHRINK = 1.6  # a split Gaussian's parts are smaller by this (Kerbl et al. 2023)
CLONE_BELOW = 0.01  # of the scene's half side: smaller ones are cloned in place, larger ones split
MAX_SCALE = 0.5  # of the scene's half side: larger ones go


class GradientStats:
    """Mean image-plane gradient per Gaussian since the last round, over the steps that drew it."""

    def __init__(self, count: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(count, device=device)
        self.seen = torch.zeros(count, device=device)

    def add(self, means2d_grad: Tensor, size: int) -> None:  # [C, N, 2] per pixel; size = longer image side
        norms = means2d_grad.norm(dim=-1) * (size / 2)
        self.total += norms.sum(0)
        self.seen += (norms > 0).sum(0)

    def mean(self) -> Tensor:  # [N]
        return self.total / self.seen.clamp_min(1)


def keep_mask(gaussians: Gaussians4D, stats: GradientStats, min_opacity: float, half_side: float) -> Tensor:
    """bool [N]: bright enough at its best moment within the clip, not overgrown, and seen since the last round."""
    time = gaussians.times.clamp(0, 1)
    u = (time - gaussians.times) / gaussians.log_durations.exp()
    best = gaussians.opacity_logits.sigmoid() * torch.exp(-0.5 * u * u)
    return (best > min_opacity) & (gaussians.log_scales.max(-1).values.exp() < MAX_SCALE * half_side) & (stats.seen > 0)


def choose(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ties broken by index, so that the choice is reproducible."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[: min(count, int((scores > 0).sum()))]


def grow(
    gaussians: Gaussians4D,
    chosen: Tensor,  # [k] int64
    half_side: float,
    generator: torch.Generator,  # on the CPU, so that both devices draw the same
) -> tuple[Gaussians4D, Tensor]:
    """Each chosen Gaussian becomes two; returns all N + k and the source index of every one [N + k].

    A small one is cloned, a large one split: both halves sampled from the 4D Gaussian itself (in time too) and
    shrunk.  Each half's opacity is 1 - √(1 - o), so that the two together cover what the one did.
    """
    k = len(chosen)
    parent = gaussians.map(lambda x: x[chosen])
    scales = parent.log_scales.exp()
    is_split = scales.max(-1).values > CLONE_BELOW * half_side
    halves = []
    for _ in range(2):
        noise = torch.randn(k, 4, generator=generator).to(scales)
        dt = noise[:, 3] * parent.log_durations.exp() * is_split
        dt = ((parent.times + dt).clamp(0, 1) - parent.times) * is_split
        local = rotation_matrices(parent.quats) @ (noise[:, :3] * scales)[:, :, None]
        offset = local[:, :, 0] * is_split[:, None] + parent.velocities * dt[:, None]
        half = parent.map(torch.clone)
        half.means, half.times = parent.means + offset, parent.times + dt
        half.log_scales = parent.log_scales - math.log(SPLIT_SHRINK) * is_split[:, None]
        half.opacity_logits = _halved(parent.opacity_logits)
        halves.append(half)
    first, second = halves
    grown = {}
    for name, tensor in gaussians.tensors().items():
        tensor = tensor.clone()
        tensor[chosen] = getattr(first, name)
        grown[name] = torch.cat([tensor, getattr(second, name)])
    source = torch.cat([torch.arange(len(gaussians), device=chosen.device), chosen])
    return Gaussians4D(**grown), source


def _halved(logits: Tensor) -> Tensor:
    """Opacity logits of two equal layers that together are as opaque as one."""
    return torch.logit(1 - torch.sqrt(1 - logits.sigmoid().clamp_max(1 - 1e-6)), eps=1e-6)
