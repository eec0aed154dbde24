"""Measures of pictures: what they are on cases that can be worked out."""

from __future__ import annotations

import math

import pytest
import torch

from d2.recon import metrics
from d2.recon.losses import C1, C2, TAPS


def pictures(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(0))
    return x, (x + 0.2 * torch.rand(size, size, 3, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def terms(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure over all windows inside the picture, window by window."""
    weights = torch.outer(torch.from_numpy(TAPS), torch.from_numpy(TAPS)).double()[..., None]
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (picture[i : i + 11, j : j + 11].double() for picture in (x, y))
            ma, mb = ((weights * p).sum((0, 1)) for p in (a, b))
            va, vb, ab = ((weights * p * q).sum((0, 1)) for p, q in ((a, a), (b, b), (a, b)))
            structure = (2 * (ab - ma * mb) + C2) / (va - ma**2 + vb - mb**2 + C2)
            found.append(torch.stack([structure * (2 * ma * mb + C1) / (ma**2 + mb**2 + C1), structure]))
    return tuple(torch.stack(found).mean((0, 2)).tolist())


def test_ms_ssim_of_a_small_picture_is_that_of_the_scales_that_fit():
    x, y = pictures(23)  # 23 and 11 pixels: two scales
    coarse = [p[:22, :22].reshape(11, 2, 11, 2, 3).mean((1, 3)) for p in (x, y)]
    fine, w = metrics.SCALE_WEIGHTS[:2], sum(metrics.SCALE_WEIGHTS[:2])
    expected = terms(x, y)[1] ** (fine[0] / w) * terms(*coarse)[0] ** (fine[1] / w)
    assert metrics.ms_ssim(x, y) == pytest.approx(expected, rel=1e-5)


def test_ms_ssim_is_one_for_equal_pictures_and_nothing_for_tiny_ones():
    x, y = pictures(180)
    assert metrics.ms_ssim(x, x) == pytest.approx(1)
    assert 0 < metrics.ms_ssim(x, y) < 1
    assert math.isnan(metrics.ms_ssim(*pictures(10)))


def clip() -> torch.Tensor:  # [F, 4, H, W]
    """Two opaque pixels, of which the right one brightens, and an empty one."""
    truth = torch.zeros(3, 4, 1, 3)
    truth[:, 3, 0, :2] = 1
    truth[:, :3, 0, 0] = 0.5
    truth[:, :3, 0, 1] = torch.tensor([0.0, 0.2, 0.4])[:, None]
    return truth


def test_the_truth_does_not_flicker_and_has_all_of_its_motion():
    assert metrics.over_time([(clip()[:, :3], clip())]) == {"flicker": 0.0, "motion": pytest.approx(1)}


def test_flicker_counts_opaque_still_pixels_alone_and_motion_the_moving_ones():
    sample = clip()[:, :3].clone()
    sample[1, :, 0, 0] += 0.3  # the still pixel flashes
    sample[:, :, 0, 1] *= 0.5  # the moving one moves half as far
    sample[1, :, 0, 2] = 1.0  # an empty one: nobody's business but the motion's
    found = metrics.over_time([(sample, clip())])
    assert found == {"flicker": pytest.approx(0.3), "motion": pytest.approx(0.5)}


def test_without_still_or_moving_pixels_there_is_no_number():
    still, moving = clip()[..., :1], clip()[..., 1:2]
    assert math.isnan(metrics.over_time([(still[:, :3], still)])["motion"])
    assert math.isnan(metrics.over_time([(moving[:, :3], moving)])["flicker"])


def test_bands_of_elevation_hold_their_pictures_and_a_camera_on_a_border_is_above_it():
    middle = torch.tensor([1.0, 2.0, 3.0])
    angles = torch.tensor([-5.0, 10.0, 12.0, 35.0]).deg2rad()
    positions = middle + 4 * torch.stack([angles.cos(), torch.zeros(4), angles.sin()], -1)
    bands = metrics.by_elevation([20.0, 30.0, 31.0, 25.0], metrics.elevations(positions, middle))
    assert [(b["from_deg"], b["to_deg"], b["psnr"], b["pictures"]) for b in bands] == [
        (-10, 0, 20.0, 1), (10, 20, 30.5, 2), (30, 40, 25.0, 1),
    ]  # fmt: skip
