"""How close pictures are to the truth: PSNR, SSIM, MS-SSIM, flicker, share of the motion, PSNR by elevation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2.recon.losses import C1, C2, TAPS, WINDOW, ssim

__all__ = ["by_elevation", "elevations", "ms_ssim", "over_time", "psnr", "psnr_foreground", "ssim"]
PSNR_CAP = 100.0  # dB, for identical pictures
STILL = 0.01  # the greatest change of a pixel's true colour that counts as none, of 0..1
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, fine to coarse
BAND_DEG = 10  # height of a band of elevations
_BAND_SLACK = 1e-3  # degrees: 9.9999 belongs to the band that begins at 10


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures [..., 3] in 0..1, both clamped to that range."""
    return _decibel((x.clamp(0, 1) - y.clamp(0, 1)).square().mean())


def psnr_foreground(x: Tensor, y: Tensor, alpha: Tensor) -> float:
    """PSNR in dB over the pixels where the truth's alpha [...] is above one half; NaN when there are none."""
    inside = alpha > 0.5
    if not inside.any():
        return math.nan
    return _decibel((x.clamp(0, 1) - y.clamp(0, 1))[inside].square().mean())


def ms_ssim(x: Tensor, y: Tensor) -> float:
    """Multi-scale structural similarity of pictures [H, W, 3] in 0..1 (Wang, Simoncelli and Bovik 2003).

    Windows lie wholly inside the picture, so the shorter side has at least 11 pixels at every scale: five scales from
    176 pixels, four from 88, three from 44, two from 22, one from 11, with the weights of those used scaled to sum to
    1; NaN for smaller pictures.
    """
    side = min(x.shape[:2])
    scales = [k for k in range(len(SCALE_WEIGHTS)) if side >> k >= WINDOW]
    if not scales:
        return math.nan
    x, y = (picture.clamp(0, 1).double().permute(2, 0, 1)[None] for picture in (x, y))
    value = 1.0
    for k in scales:
        luminance, structure = _similarity_terms(x, y)
        term = luminance * structure if k == scales[-1] else structure
        value *= max(0.0, float(term.mean())) ** (SCALE_WEIGHTS[k] / sum(SCALE_WEIGHTS[: len(scales)]))
        x, y = (torch.nn.functional.avg_pool2d(picture, 2) for picture in (x, y))
    return value


def over_time(videos: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """ "flicker" and "motion" of pairs of videos: a sample's [F, 3, H, W] in 0..1 and the truth's [F, 4, H, W].

    Flicker is how much pixels change from a moment to the next (root mean square) where the truth is opaque and
    still, which is where no channel changes by STILL; 0 is right.  Motion is the share of the truth's change that is
    in the sample (least squares); 1 is right, a still has 0.  NaN where nothing is still, or nothing moves.
    """
    wrong, still, along, expected = 0.0, 0, 0.0, 0.0
    for sample, truth in videos:
        change, true_change = sample.diff(dim=0), truth[:, :3].diff(dim=0)
        is_still = (true_change.abs().amax(1) < STILL) & (truth[1:, 3] > 0.5)
        wrong += float(change.movedim(1, -1)[is_still].square().sum())
        still += 3 * int(is_still.sum())
        along += float((change * true_change).sum())
        expected += float(true_change.square().sum())
    return {
        "flicker": math.sqrt(wrong / still) if still else math.nan,
        "motion": along / expected if expected else math.nan,
    }


def elevations(
    positions: Tensor,  # [n, 3] world, of cameras
    middle: Tensor,  # [3] what they look at
) -> Tensor:  # [n] rad
    """Angles above the horizon, z up."""
    offset = positions - middle
    return torch.atan2(offset[:, 2], offset[:, :2].norm(dim=-1))


def by_elevation(
    values: Sequence[float],  # [n] dB, one a picture
    elevations: Tensor,  # [n] rad
) -> list[dict[str, Any]]:
    """Mean PSNR in dB of each band of BAND_DEG degrees that holds a picture, from below to above."""
    bands: dict[int, list[float]] = {}
    for value, elevation in zip(values, elevations.tolist(), strict=True):
        bands.setdefault(math.floor((math.degrees(elevation) + _BAND_SLACK) / BAND_DEG), []).append(value)
    return [
        {
            "from_deg": BAND_DEG * band,
            "to_deg": BAND_DEG * (band + 1),
            "psnr": round(statistics.fmean(found), 3),
            "pictures": len(found),
        }
        for band, found in sorted(bands.items())
    ]


def _similarity_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [1, 3, H, W] -> [3, 1, H', W'] twice
    """SSIM's luminance, and its contrast times structure, at every place of the window."""
    planes = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    taps = torch.from_numpy(TAPS).to(planes)
    taps = taps / taps.sum()
    blurred = torch.nn.functional.conv2d(planes, taps.view(1, 1, -1, 1))
    blurred = torch.nn.functional.conv2d(blurred, taps.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = blurred.unflatten(0, (5, 3))
    luminance = (2 * mx * my + C1) / (mx * mx + my * my + C1)
    return luminance, (2 * (xy - mx * my) + C2) / (xx - mx * mx + yy - my * my + C2)


def _decibel(mse: Tensor) -> float:
    return min(PSNR_CAP, -10 * math.log10(max(float(mse), 1e-20))) if torch.isfinite(mse) else 0.0
