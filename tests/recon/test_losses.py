"""The loss kernels against their torch twin, and SSIM against its properties."""

from __future__ import annotations

import pytest
import torch

from d2.recon.losses import photometric_loss, photometric_loss_reference, ssim
from d2.recon.metrics import psnr, psnr_foreground


def pictures(height: int, width: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    alpha = torch.rand(height, width, generator=g)
    image = torch.rand(height, width, 3, generator=g) * alpha[..., None]
    target = (torch.rand(height, width, 4, generator=g) * 255).to(torch.uint8)
    return image, alpha, target, torch.rand(3, generator=g)


@pytest.mark.parametrize("size", [(16, 24), (7, 9), (40, 33)])
@pytest.mark.parametrize("weights", [(0.2, 0.1), (0.0, 0.5), (1.0, 0.0), (0.2, 0.1, 0.05)])
def test_loss_and_gradients_equal_the_twin(size, weights):
    image, alpha, target, background = pictures(*size)
    x, a = image.clone().requires_grad_(), alpha.clone().requires_grad_()
    loss = photometric_loss(x, a, target, background, *weights)
    ours = torch.autograd.grad(3 * loss, (x, a))
    x, a = image.double().requires_grad_(), alpha.double().requires_grad_()
    twin_loss = photometric_loss_reference(x, a, target, background.double(), *weights)
    twin = torch.autograd.grad(3 * twin_loss, (x, a))
    assert loss.item() == pytest.approx(twin_loss.item(), rel=1e-5)
    for mine, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()) + 1e-12)


def test_gradient_of_the_twin_equals_finite_differences():
    image, alpha, target, background = pictures(13, 12)
    arguments = (target, background.double(), 0.3, 0.2)
    assert torch.autograd.gradcheck(
        lambda x, a: photometric_loss_reference(x, a, *arguments),
        (image.double().requires_grad_(), alpha.double().requires_grad_()),
    )


def test_charbonnier_is_l1_for_large_errors_and_half_the_square_over_its_width_for_small_ones():
    target, background = torch.zeros(1, 1, 4, dtype=torch.uint8), torch.zeros(3)

    def loss(error):
        return float(photometric_loss(torch.full((1, 1, 3), error), torch.zeros(1, 1), target, background, 0, 0, 0.1))

    assert loss(10.0) == pytest.approx(10 - 0.1, abs=1e-3)
    assert loss(0.01) == pytest.approx(0.01**2 / 0.2, rel=1e-2)


def test_ssim_is_one_for_equal_pictures_and_less_for_noise_or_blur():
    x = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert float(ssim(x, x)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(x, 0.5 * x + 0.25)) < 0.9
    assert float(ssim(x, torch.rand_like(x))) < 0.2


def test_psnr_of_a_known_error():
    x = torch.full((8, 8, 3), 0.5)
    assert psnr(x + 0.1, x) == pytest.approx(20, abs=1e-4)
    assert psnr(x, x) == 100
    alpha = torch.zeros(8, 8)
    alpha[:2] = 1
    y = x.clone()
    y[:2] += 0.1
    assert psnr_foreground(y, x, alpha) == pytest.approx(20, abs=1e-4)
    assert psnr(y, x) == pytest.approx(20 + 6.0206, abs=1e-3)
