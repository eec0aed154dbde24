"""Small random scenes and cameras for the rasterizer's tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import Motion

SIZE, VIEWS, FRAMES = 24, 6, 4  # of the pictures of the moving ball


def gaussians(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Activated 3D Gaussians around the origin, as `rasterize` takes them."""
    g = torch.Generator().manual_seed(seed)
    return {
        "means": 0.5 * torch.randn(count, 3, generator=g, dtype=dtype),
        "quats": torch.randn(count, 4, generator=g, dtype=dtype),
        "scales": torch.exp(0.4 * torch.randn(count, 3, generator=g, dtype=dtype) - 2.2),
        "opacities": 0.02 + 0.95 * torch.rand(count, generator=g, dtype=dtype),
        "colors": torch.rand(count, 3, generator=g, dtype=dtype),
    }


def motion(count: int, t: list[float], seed: int = 1, dtype: torch.dtype = torch.float64) -> Motion:
    g = torch.Generator().manual_seed(seed)
    return Motion(
        velocities=0.3 * torch.randn(count, 3, generator=g, dtype=dtype),
        times=torch.rand(count, generator=g, dtype=dtype),
        durations=0.2 + torch.rand(count, generator=g, dtype=dtype),
        t=torch.tensor(t, dtype=dtype),
    )


def camera(width: int, height: int, distance: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """viewmat [4, 4], turned a little about two axes, and K [3, 3] with an off-centre principal point."""
    a, b = torch.tensor(0.3, dtype=dtype), torch.tensor(-0.2, dtype=dtype)
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    about_y = torch.stack([a.cos(), zero, a.sin(), zero, one, zero, -a.sin(), zero, a.cos()]).view(3, 3)
    about_x = torch.stack([one, zero, zero, zero, b.cos(), -b.sin(), zero, b.sin(), b.cos()]).view(3, 3)
    viewmat = torch.eye(4, dtype=dtype)
    viewmat[:3, :3] = about_x @ about_y
    viewmat[:3, 3] = torch.tensor([0.1, -0.05, distance], dtype=dtype)
    K = torch.tensor([[1.1 * width, 0, width / 2 + 1.5], [0, 1.05 * width, height / 2 - 2], [0, 0, 1]], dtype=dtype)
    return viewmat, K


def gaussians_4d(count: int, sh_degree: int = 0, seed: int = 0) -> Gaussians4D:
    g = torch.Generator().manual_seed(seed)
    return Gaussians4D(
        means=0.5 * torch.randn(count, 3, generator=g),
        velocities=0.3 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g),
        log_durations=torch.log(0.2 + torch.rand(count, generator=g)),
        quats=torch.randn(count, 4, generator=g),
        log_scales=0.4 * torch.randn(count, 3, generator=g) - 2.2,
        opacity_logits=torch.randn(count, generator=g),
        sh=0.5 * torch.randn(count, (sh_degree + 1) ** 2, 3, generator=g),
    )


def moving_ball() -> Gaussians4D:
    """A red ball that moves along x during the clip, and a blue one that stays."""
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9]])
    return Gaussians4D(
        means=torch.tensor([[-0.3, 0.0, 0.1], [0.0, 0.3, -0.3]]),
        velocities=torch.tensor([[0.8, 0, 0], [0, 0, 0.0]]),
        times=torch.zeros(2),
        log_durations=torch.full((2,), 3.0),
        quats=torch.tensor([[1.0, 0, 0, 0]] * 2),
        log_scales=torch.log(torch.tensor([[0.15] * 3, [0.2] * 3])),
        opacity_logits=torch.full((2,), 6.0),
        sh=((colors - 0.5) / 0.28209479177387814)[:, None],
    )


def spinning_ball(count: int = 6000, turn: float = 1.0, radius: float = 0.4) -> Gaussians4D:
    """A ball that turns about z by `turn` rad during the clip; its Gaussians lie flat on it and live a tenth of it."""
    g = torch.Generator().manual_seed(0)
    outward = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=-1)
    means, up = radius * outward, torch.tensor([0.0, 0, 1]).expand(count, 3)
    quats = torch.cat([1 + outward[:, 2:], torch.linalg.cross(up, outward)], -1)  # bring z to the outward direction
    return Gaussians4D(
        means=means,
        velocities=torch.linalg.cross(turn * up, means),
        times=1.4 * torch.rand(count, generator=g) - 0.2,  # as many at the ends of the clip as within
        log_durations=torch.full((count,), math.log(0.1)),
        quats=torch.nn.functional.normalize(quats, dim=-1),
        log_scales=torch.log(torch.tensor([0.035, 0.035, 0.004]) * radius / 0.4).repeat(count, 1),
        opacity_logits=torch.full((count,), 4.0),
        sh=(0.5 * outward / 0.28209479177387814)[:, None],
    )
