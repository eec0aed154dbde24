import math

import pytest
import torch
from torch import nn

from d2.models.blocks import sinusoid
from d2.models.conditioner import (
    SV3D_SLOTS,
    SVD_SLOTS,
    Conditioner,
    Conditioning,
    condition,
    join,
    sv3d_angles,
    sv3d_vector,
    svd_vector,
)
from d2.models.unet import VideoUNet


def test_sinusoids_are_cosines_then_sines_of_falling_frequencies():
    (ours,) = sinusoid(torch.tensor([3.0]), 8)
    frequencies = [10000 ** (-k / 4) for k in range(4)]
    expected = [math.cos(3 * f) for f in frequencies] + [math.sin(3 * f) for f in frequencies]
    torch.testing.assert_close(ours, torch.tensor(expected))
    assert sinusoid(torch.tensor([3.0]), 9)[0, -1] == 0


def test_svd_numbers_are_frame_rate_motion_and_augmentation_as_they_are():
    vector = svd_vector(24, 127, 0.02, T=3)
    assert vector.shape == (3, 768)
    for row in vector:
        torch.testing.assert_close(row.view(3, 256), sinusoid(torch.tensor([24.0, 127.0, 0.02]), 256))


def test_sv3d_numbers_are_augmentation_polar_angle_and_azimuth():
    polar, azimuth = torch.tensor([1.4, 1.2]), torch.tensor([3.0, 6.28])
    vector = sv3d_vector(1e-5, polar, azimuth)
    assert vector.shape == (2, 1280)
    torch.testing.assert_close(vector[1, 256:768], sinusoid(polar, 512)[1])
    torch.testing.assert_close(vector[1, 768:], sinusoid(azimuth, 512)[1])


def test_sv3d_counts_azimuth_from_the_input_view_which_is_a_full_turn():
    orbit = torch.deg2rad(torch.linspace(0, 360, 22, dtype=torch.float64)[1:])
    polar, azimuth = sv3d_angles(torch.deg2rad(torch.full((21,), 10.0, dtype=torch.float64)), orbit)
    torch.testing.assert_close(polar, torch.full_like(polar, math.radians(80)))
    torch.testing.assert_close(azimuth, orbit)
    turned = sv3d_angles(polar, orbit + 0.7)[1]
    torch.testing.assert_close(turned, orbit)
    assert azimuth[-1] == 2 * math.pi


def test_without_the_picture_the_numbers_stay():
    cond = Conditioning(torch.randn(1, 2, 3), torch.randn(1, 2, 4, 5, 5), torch.randn(1, 2, 6))
    uncond = cond.unconditional()
    assert not uncond.crossattn.any()
    assert not uncond.concat.any()
    assert torch.equal(uncond.vector, cond.vector)


@pytest.mark.parametrize("slots", [SVD_SLOTS, SV3D_SLOTS])
def test_the_token_sees_the_clean_picture_and_the_latent_the_noisy_one(slots, clip_config, vae_config):
    conditioner = Conditioner(slots, clip_config, vae_config).eval()
    for parameter in conditioner.clip.parameters():
        nn.init.normal_(parameter, std=0.1)
    image, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    token, latent = conditioner(image, noise, 0.5)
    torch.testing.assert_close(token, conditioner.clip(image))
    torch.testing.assert_close(latent, conditioner.vae.mode(image + 0.5 * noise))
    assert latent.shape == (1, 4, 8, 8)


def test_a_picture_conditions_every_member_of_its_sequence():
    token, latent, vector = torch.randn(2, 3), torch.randn(2, 4, 5, 5), torch.randn(7, 6)
    cond = condition(token, latent, vector)
    assert cond.crossattn.shape == (2, 7, 3)
    assert torch.equal(cond.concat[1, 6], latent[1])
    assert torch.equal(cond.vector[1], vector)


def test_joined_conditions_keep_their_cached_tokens(unet_config):
    unet = VideoUNet(unet_config).eval().requires_grad_(False)
    parts = []
    for _ in range(2):
        cond = Conditioning(torch.randn(1, 3, 24), torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 40))
        parts.append(cond.with_tokens(unet.project_context(cond.crossattn.flatten(0, 1), 3)))
    joined = join(parts)
    expected = unet.project_context(joined.crossattn.flatten(0, 1), 3)
    assert joined.tokens is not None
    for ours, theirs in zip(joined.tokens, expected, strict=True):
        for (token, first), (other, other_first) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(token, other)
            torch.testing.assert_close(first, other_first)
    assert join([parts[0], parts[1].unconditional()]).tokens is None
