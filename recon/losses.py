"""The photometric loss, L1 + SSIM + mask, with its gradient: numba kernels on CPU, a torch twin for CUDA and tests.

loss = (1 - λ) mean|x - y| + λ (1 - SSIM(x, y)) + μ mean|A - Â|, x and y composited on the step's background.
Charbonnier (1994) takes √(d² + ε²) - ε for |d|: the mean of what disagrees by less than ε, and the median beyond.
SSIM: Wang et al. 2004 with the 11-tap Gaussian window (σ 1.5), zero padding, as 3D Gaussian Splatting uses it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
SHARPEST = 1e-9  # Charbonnier's width that stands for L1
f4 = np.float32
_taps = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
TAPS = (_taps / _taps.sum()).astype(f4)
_C1, _C2, ZERO, ONE, TWO, BYTE = f4(C1), f4(C2), f4(0), f4(1), f4(2), f4(1 / 255)
FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "afn", "reassoc"}


def photometric_loss(
    image: Tensor,  # [H, W, 3] premultiplied render
    alpha: Tensor,  # [H, W]
    target: Tensor,  # [H, W, 4] uint8, premultiplied
    background: Tensor,  # [3] put behind both
    ssim_weight: float,  # λ
    mask_weight: float,  # μ
    charbonnier: float = 0.0,  # ε
) -> Tensor:
    """The scalar loss; picks the kernels on CPU and the twin elsewhere."""
    if image.device.type == "cpu" and image.dtype == torch.float32:
        return _Photometric.apply(image, alpha, target, background, ssim_weight, mask_weight, charbonnier)  # type: ignore[return-value]
    return photometric_loss_reference(image, alpha, target, background, ssim_weight, mask_weight, charbonnier)


def photometric_loss_reference(image, alpha, target, background, ssim_weight, mask_weight, charbonnier=0.0) -> Tensor:
    """The twin: same arguments, plain torch, differentiated by autograd."""
    truth = target.to(image.dtype) / 255
    x = image + (1 - alpha[..., None]) * background
    y = truth[..., :3] + (1 - truth[..., 3:]) * background
    distance = ((x - y).square() + charbonnier**2).sqrt() - charbonnier if charbonnier else (x - y).abs()
    loss = (1 - ssim_weight) * distance.mean() + mask_weight * (alpha - truth[..., 3]).abs().mean()
    return loss + ssim_weight * (1 - ssim(x, y)) if ssim_weight else loss


def ssim(x: Tensor, y: Tensor) -> Tensor:  # [H, W, 3] in 0..1, both -> scalar, mean over pixels and channels
    """Structural similarity, one scale."""
    planes = torch.stack([x, y, x * x, y * y, x * y]).permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    taps = torch.from_numpy(TAPS.astype(np.float64)).to(planes)
    taps = taps / taps.sum()
    half = WINDOW // 2
    blurred = torch.nn.functional.conv2d(planes, taps.view(1, 1, -1, 1), padding=(half, 0))
    blurred = torch.nn.functional.conv2d(blurred, taps.view(1, 1, 1, -1), padding=(0, half))
    mx, my, xx, yy, xy = blurred.view(5, 3, *x.shape[:2])
    luminance = (2 * mx * my + C1) / (mx * mx + my * my + C1)
    structure = (2 * (xy - mx * my) + C2) / (xx - mx * mx + yy - my * my + C2)
    return (luminance * structure).mean()


def soften(layers: Tensor) -> Tensor:  # [H, W, C], both
    """The picture under SSIM's window, a Gaussian of 1.5 pixels, with nothing around it."""
    if layers.device.type == "cpu" and layers.dtype == torch.float32:
        return _Soften.apply(layers)  # type: ignore[return-value]
    return soften_reference(layers)


def soften_reference(layers: Tensor) -> Tensor:
    """The twin."""
    taps = torch.from_numpy(TAPS).to(layers)
    planes = layers.permute(2, 0, 1)[:, None]
    blurred = torch.nn.functional.conv2d(planes, taps.view(1, 1, -1, 1), padding=(WINDOW // 2, 0))
    return torch.nn.functional.conv2d(blurred, taps.view(1, 1, 1, -1), padding=(0, WINDOW // 2))[:, 0].permute(1, 2, 0)


class _Soften(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Tensor) -> Tensor:  # type: ignore[override]
        planes = np.ascontiguousarray(layers.detach().permute(2, 0, 1).numpy())
        out = np.empty_like(planes)
        _blur(planes, out)
        return torch.from_numpy(out).permute(1, 2, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        return _Soften.apply(g)  # it is its own transpose


class _Photometric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image, alpha, target, background, ssim_weight, mask_weight, charbonnier) -> Tensor:  # type: ignore[override]
        height, width = alpha.shape
        arrays = [np.ascontiguousarray(x.detach().numpy()) for x in (image, alpha, target, background)]
        planes = np.empty((15, height, width), f4)
        g_image, g_alpha = np.zeros((height, width, 3), f4), np.zeros((height, width), f4)
        weights = f4(1 - ssim_weight), f4(mask_weight), f4(max(charbonnier, SHARPEST))
        loss = _absolute(*arrays, *weights, planes, g_image, g_alpha).sum()
        if ssim_weight:
            scratch, gradient = np.empty_like(planes), np.empty((9, height, width), f4)
            _blur(planes, scratch)
            similarity = _similarity(scratch, gradient).sum() / (3 * height * width)
            loss += ssim_weight * (1 - similarity)
            _blur(gradient, scratch[:9])
            _similarity_backward(scratch, planes, f4(-ssim_weight / (3 * height * width)), arrays[3], g_image, g_alpha)
        ctx.gradients = torch.from_numpy(g_image), torch.from_numpy(g_alpha)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[override]
        g_image, g_alpha = ctx.gradients
        return g_image * g, g_alpha * g, None, None, None, None, None


@njit(fastmath=FAST)
def _signed(weight, x):
    """weight · sign(x), as selects that vectorise."""
    return weight if x > ZERO else (-weight if x < ZERO else ZERO)


@njit(parallel=True, fastmath=FAST, cache=True)
def _absolute(image, alpha, target, background, weight, mask_weight, epsilon, planes, g_image, g_alpha):
    """Charbonnier terms per row [H] and their gradients; fills planes x y xx yy xy (3 channels each) for SSIM."""
    height, width = alpha.shape
    rows = np.zeros(height, np.float64)
    w_color, w_mask = weight / f4(3 * height * width), mask_weight / f4(height * width)
    for i in prange(height):
        total = ZERO
        for j in range(np.uint64(width)):  # unsigned, as everywhere here: signed indices stop vectorisation
            d = alpha[i, j] - f4(target[i, j, 3]) * BYTE
            total += w_mask * abs(d)
            g_alpha[i, j] = _signed(w_mask, d)
        for k in range(3):
            for j in range(np.uint64(width)):
                x = image[i, j, k] + (ONE - alpha[i, j]) * background[k]
                y = f4(target[i, j, k]) * BYTE + (ONE - f4(target[i, j, 3]) * BYTE) * background[k]
                planes[k, i, j], planes[3 + k, i, j] = x, y
                planes[6 + k, i, j], planes[9 + k, i, j], planes[12 + k, i, j] = x * x, y * y, x * y
                d = x - y
                root = math.sqrt(d * d + epsilon * epsilon)
                total += w_color * (root - epsilon)
                g = w_color * d / root
                g_image[i, j, k] = g
                g_alpha[i, j] -= g * background[k]
        rows[i] = total
    return rows


@njit(parallel=True, fastmath=FAST, cache=True)
def _blur(planes, out):
    """Separable 11-tap Gaussian over [P, H, W] with zero padding; it is its own transpose."""
    count, height, width = planes.shape
    half = WINDOW // 2
    for i in prange(count * height):
        p, y = i // height, i % height
        row = np.zeros(width + WINDOW - 1, f4)
        for k in range(max(0, half - y), min(WINDOW, height + half - y)):
            tap = TAPS[k]
            for x in range(np.uint64(width)):
                row[np.uint64(half) + x] += tap * planes[p, y + k - half, x]
        for x in range(np.uint64(width)):
            total = ZERO
            for k in range(np.uint64(WINDOW)):
                total += TAPS[k] * row[x + k]
            out[p, y, x] = total


@njit(parallel=True, fastmath=FAST, cache=True)
def _similarity(blurred, gradient):
    """Sums of SSIM per row [H]; gradient [9, H, W] of SSIM in blurred x, xx and xy (3 channels each)."""
    _, height, width = blurred.shape
    rows = np.zeros(height, np.float64)
    for i in prange(height):
        total = ZERO
        for k in range(3):
            for j in range(width):
                mx, my = blurred[k, i, j], blurred[3 + k, i, j]
                a1, b1 = TWO * mx * my + _C1, mx * mx + my * my + _C1
                a2 = TWO * (blurred[12 + k, i, j] - mx * my) + _C2
                b2 = blurred[6 + k, i, j] - mx * mx + blurred[9 + k, i, j] - my * my + _C2
                scale = ONE / (b1 * b2)
                s = a1 * a2 * scale
                total += s
                gradient[k, i, j] = TWO * (my * (a2 - a1) * scale - s * mx * (ONE / b1 - ONE / b2))
                gradient[3 + k, i, j] = -s / b2
                gradient[6 + k, i, j] = TWO * a1 * scale
        rows[i] = total
    return rows


@njit(parallel=True, fastmath=FAST, cache=True)
def _similarity_backward(blurred, planes, weight, background, g_image, g_alpha):
    """Adds weight · dSSIM: blurred [9, …] are the three gradient maps after the (transposed) blur."""
    height, width = g_alpha.shape
    for i in prange(height):
        for k in range(3):
            for j in range(np.uint64(width)):
                x, y = planes[k, i, j], planes[3 + k, i, j]
                g = blurred[k, i, j] + TWO * x * blurred[3 + k, i, j] + y * blurred[6 + k, i, j]
                g_image[i, j, k] += weight * g
                g_alpha[i, j] -= weight * g * background[k]
