"""What a fit minimises: the loss of a picture, as dataset and configuration weigh it, and priors of the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2.recon.config import ReconstructConfig
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.losses import photometric_loss
from d2.recon.perceptual import LPIPS

CONSISTENT = 0.05  # the loss above which a picture contradicts others (benchmarks/robustness.py)


def picture_loss(
    image: Tensor,  # [H, W, 3] premultiplied render
    alpha: Tensor,  # [H, W]
    train: Dataset,
    cell: int,
    background: Tensor,  # [3]
    config: ReconstructConfig,
    lpips: LPIPS | None,
) -> Tensor:
    """The loss of one picture, as much as it counts; its worst pixels teach nothing."""
    target = train.images[cell]
    if config.trim:
        with torch.no_grad():
            error = (_before(image, alpha, background) - _truth(target, background)).abs().sum(-1)
            taught = error <= error.flatten().kthvalue(math.ceil((1 - config.trim) * error.numel())).values
        image = torch.where(taught[..., None], image, image.detach())
        alpha = torch.where(taught, alpha, alpha.detach())
    mask_weight = config.mask_weight if train.has_alpha else 0.0
    loss = photometric_loss(image, alpha, target, background, config.ssim_weight, mask_weight, config.charbonnier)
    if lpips is not None:
        pair = _before(image, alpha, background), _truth(target, background)
        loss = loss + config.lpips_weight * lpips(*(x.permute(2, 0, 1)[None] for x in pair))[0]
    return loss if train.weights is None else loss * train.weights[cell]


def _before(image: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """A render [H, W, 3] before a background."""
    return image + (1 - alpha[..., None]) * background


def _truth(target: Tensor, background: Tensor) -> Tensor:
    """A picture [H, W, 3] in 0..1 before the same background."""
    return target[..., :3] / 255 + (1 - target[..., 3:] / 255) * background


def priors(
    g: Gaussians4D,
    half_side: float,  # world, of the scene
    loss: Tensor,  # of the step's pictures
    fraction: float,  # of the run
    config: ReconstructConfig,
) -> Tensor | float:
    """Regularisers, each off at weight 0.

    Haze is what only one of several contradicting pictures asked for.  Pictures that agree are fitted to within
    CONSISTENT before the prior against it begins, and never feel it; the further from that, the more it weighs.
    """
    total = 0.0
    if config.duration_weight:
        total = total + config.duration_weight * torch.exp(-g.log_durations).mean()
    if config.opacity_weight:
        total = total + config.opacity_weight * g.opacity_logits.sigmoid().mean()
    if config.haze_weight and fraction >= config.correct_from:
        excess = (loss.detach() / CONSISTENT - 1).clamp_min(0)
        total = total + config.haze_weight * excess * g.opacity_logits.sigmoid().mean()
    if config.scale_weight:
        total = total + config.scale_weight * g.log_scales.exp().mean() / half_side
    return total
