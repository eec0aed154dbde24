"""Noise levels, guidance, composition schedules and frequency filters: pure functions of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Composition = Literal["constant", "linear", "cosine", "logistic"]
Filter = Literal["butterworth", "gaussian", "ideal", "box"]


def edm_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """Falling noise levels [steps+1], the last one 0, float32 (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def linear_guidance(low: float, high: float, count: int) -> Tensor:
    """Guidance scales [count] that rise from the first frame to the last (SVD)."""
    return torch.linspace(low, high, count)


def triangle_guidance(
    low: float,
    high: float,
    count: int,
    periods: Sequence[float] = (1.0,),  # in turns of the orbit
    fusing: Literal["max", "mean", "multiply"] = "max",
) -> Tensor:
    """Guidance scales [count] that are `low` at the input view and `high` at half a period from it (SV3D)."""
    turn = torch.linspace(0, 1, count)
    waves = torch.stack([2 * (turn / period - torch.floor(turn / period + 0.5)).abs() for period in periods])
    fused = {"max": waves.amax(0), "mean": waves.mean(0), "multiply": waves.prod(0)}[fusing]
    return low + fused * (high - low)


def warmed_up(
    guidance: Tensor,  # [T]
    step: int,
    steps: int,
) -> Tensor:  # [T]
    """Guidance that begins at 1 (none) in the first step and reaches its own value in the last."""
    return (guidance - 1) * progress(step, steps) + 1


def progress(step: int, steps: int) -> float:
    """q = i/(n-1), from 0 in the first step to 1 in the last."""
    return step / max(steps - 1, 1)


def composition_scale(
    kind: Composition,
    q: float,  # progress, 0..1
    scale: float = 0.6,
    low: float = 0.0,
    high: float = 1.0,
    k: float = 15.0,  # steepness of the logistic curve
) -> float:
    """s(q): the view model's weight where both models count in full; 1 is the view model alone."""
    if kind == "constant":
        return scale
    if kind == "linear":
        return high + q * (low - high)
    if kind == "cosine":
        return low + (math.cos(math.pi * q) + 1) / 2 * (high - low)
    falling = (1 - math.tanh(k * (q - scale) / 2)) / 2  # = 1 - 1/(1 + e^(-k(q - scale))), never overflows
    return low + falling * (high - low)


def frame_share(
    azimuth: Tensor,  # [V] rad, 0 at the input view
) -> Tensor:  # [V]
    """How much the frame model counts in each view: all at the front and the back, a quarter from the side.

    A video model knows a profile less well than it knows the picture it was given.
    """
    return 1 - 0.75 * torch.sin(azimuth) ** 2


def low_pass(
    shape: Sequence[int],  # of the filtered dimensions: (T, h, w) or (V, F, h, w)
    kind: Filter = "butterworth",
    order: int = 4,  # of the Butterworth filter
    spatial: float = 0.25,  # stop frequency over h and w, 1 = Nyquist
    temporal: float = 0.25,  # the same over the dimensions before them; 0 lets nothing through
) -> Tensor:  # shape, float32
    """The share kept of each frequency (FreeInit); the zero frequency is in the middle, as after fftshift.

    With N points, point k has the coordinate 2k/N - 1.
    """
    if spatial == 0 or temporal == 0:
        return torch.zeros(tuple(shape))
    if kind == "box":
        return _box(shape, spatial, temporal)
    stops = [spatial / temporal] * (len(shape) - 2) + [1.0, 1.0]
    axes = [
        (stretch * (2 * torch.arange(n, dtype=torch.float64) / n - 1)) ** 2
        for n, stretch in zip(shape, stops, strict=True)
    ]
    square = reduce(lambda total, axis: total[..., None] + axis, axes)
    if kind == "butterworth":
        kept = 1 / (1 + (square / spatial**2) ** order)
    elif kind == "gaussian":
        kept = torch.exp(-square / (2 * spatial**2))
    else:
        kept = square <= 2 * spatial
    return kept.float()


def _box(shape: Sequence[int], spatial: float, temporal: float) -> Tensor:
    mask = torch.zeros(tuple(shape))
    stops = [temporal] * (len(shape) - 2) + [spatial, spatial]
    inside = []
    for n, stop in zip(shape, stops, strict=True):
        half = round(n // 2 * stop)
        inside.append(slice(n // 2 - half, n // 2 + half))
    mask[tuple(inside)] = 1
    return mask
