"""Adapter to gsplat's CUDA rasterizer: the slice at time t in torch, all (view, time) pairs in one call."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2.errors import SetupError
from d2.recon.raster.reference import slice_at

if TYPE_CHECKING:
    from d2.recon.raster import Motion


def version() -> str:
    """The installed gsplat. Raises SetupError without one."""
    try:
        return importlib.metadata.version("gsplat")
    except importlib.metadata.PackageNotFoundError as error:
        raise SetupError("gsplat is not installed; run: pip install 'gsplat>=1.4'") from error


def rasterization() -> Any:
    """gsplat's entry point, imported only beside a working CUDA: elsewhere the import starts a doomed build."""
    if not torch.cuda.is_available():
        raise SetupError("gsplat needs a CUDA GPU and torch sees none; use --device cpu")
    try:
        from gsplat.rendering import rasterization
    except Exception as error:  # the build can fail in any way a compiler can
        raise SetupError(f"gsplat {version()} does not build here: {str(error)[-300:]}") from error
    return rasterization


def render(
    means: Tensor,  # [..., N, 3]; [N, 3] with motion
    quats: Tensor,  # [..., N, 4]
    scales: Tensor,  # [..., N, 3]
    opacities: Tensor,  # [..., N]
    colors: Tensor,  # [..., N, D] or [N, K, 3]
    viewmats: Tensor,  # [..., C, 4, 4]
    Ks: Tensor,  # [..., C, 3, 3]
    width: int,
    height: int,
    *,
    motion: Motion | None,
    backgrounds: Tensor | None,  # [..., C, D]
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images [..., C, H, W, D], alphas [..., C, H, W, 1] and means2d [..., C, N, 2], its gradient retained."""
    draw = rasterization()
    gaussians = (means, quats, scales, opacities, colors)
    if motion is not None:
        gaussians = _slices(gaussians, motion, options["sh_degree"] is not None)
        viewmats, Ks = viewmats[:, None], Ks[:, None]
        backgrounds = None if backgrounds is None else backgrounds[:, None]
    one_by_one = gaussians[0].ndim > 2 and _older_than_1_5()
    call = _call_each if one_by_one else _call
    image, alpha, means2d = call(draw, gaussians, viewmats, Ks, width, height, backgrounds, options)
    if motion is not None:
        image, alpha = image[:, 0], alpha[:, 0]
    return image, alpha, means2d


def _slices(gaussians: tuple[Tensor, ...], motion: Motion, is_sh: bool) -> tuple[Tensor, ...]:
    """One set of 3D Gaussians for each camera's time: the batch dimension of gsplat ≥ 1.5."""
    means, quats, scales, opacities, colors = gaussians
    moved = [slice_at(means, opacities, motion.velocities, motion.times, motion.durations, t) for t in motion.t]
    C = len(moved)
    each = [x.expand(C, *x.shape) for x in (quats, scales, colors)]
    return torch.stack([m for m, _ in moved]), each[0], each[1], torch.stack([o for _, o in moved]), each[2]


def _call(draw, gaussians, viewmats, Ks, width, height, backgrounds, options):
    image, alpha, meta = draw(*gaussians, viewmats, Ks, width, height, packed=False, backgrounds=backgrounds, **options)
    means2d = meta["means2d"]
    if means2d.requires_grad:
        means2d.retain_grad()
    return image, alpha, means2d


def _call_each(draw, gaussians, viewmats, Ks, width, height, backgrounds, options):
    """gsplat 1.4 has no batch dimension: one call for each leading index."""
    results = []
    for b in range(len(viewmats)):
        background = None if backgrounds is None else backgrounds[b]
        results.append(_call(draw, [x[b] for x in gaussians], viewmats[b], Ks[b], width, height, background, options))
    images, alphas, means2d = zip(*results, strict=True)
    return torch.stack(images), torch.stack(alphas), list(means2d)


def _older_than_1_5() -> bool:
    major, minor = version().split(".")[:2]
    return (int(major), int(minor)) < (1, 5)
