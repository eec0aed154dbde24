"""How close two pictures are: PSNR, foreground PSNR, SSIM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2.recon.losses import ssim

__all__ = ["psnr", "psnr_foreground", "ssim"]
PSNR_CAP = 100.0  # dB, for identical pictures


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures [..., 3] in 0..1, both clamped to that range."""
    return _decibel((x.clamp(0, 1) - y.clamp(0, 1)).square().mean())


def psnr_foreground(x: Tensor, y: Tensor, alpha: Tensor) -> float:
    """PSNR in dB over the pixels where the truth's alpha [...] is above one half; NaN when there are none."""
    inside = alpha > 0.5
    if not inside.any():
        return math.nan
    return _decibel((x.clamp(0, 1) - y.clamp(0, 1))[inside].square().mean())


def _decibel(mse: Tensor) -> float:
    return min(PSNR_CAP, -10 * math.log10(max(float(mse), 1e-20))) if torch.isfinite(mse) else 0.0
