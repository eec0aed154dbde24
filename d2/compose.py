"""One estimate out of two: the view model's of every column and the frame model's of every row.

Diffusion² (arXiv 2404.02148): the score of the whole matrix is taken as a convex combination of the scores
of its columns and of its rows, which for denoisers is the same combination of their estimates.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2.denoiser import Estimate

V_CELLS = slice(None), None, None, None, None  # [V] and [F], indexed so, stand for [V, F, C, h, w]
F_CELLS = None, slice(None), None, None, None
Unconditional = Literal["default", "sv3d", "svd", "mean"]


class Weights(NamedTuple):
    """What each model's estimate counts; they add up to 1 in every view."""

    view: Tensor  # [V]
    frame: Tensor  # [V]


def weights(
    share: Tensor,  # [V] from schedule.frame_share
    scale: float,  # s from schedule.composition_scale
    frame_only: bool = False,
) -> Weights:
    """D = (1 - share + share·s)·D_view + share·(1 - s)·D_frame, or D_frame alone."""
    frame = torch.ones_like(share) if frame_only else share * (1 - scale)
    return Weights(1 - frame, frame)


def needed(weights: Weights, unconditional: Unconditional) -> tuple[bool, bool]:  # the view model, the frame model
    """Which models have to be evaluated: those with a weight, and one that lends the other its guess."""
    view, frame = bool(weights.view.any()), bool(weights.frame.any())
    lends_view = frame and unconditional in ("sv3d", "mean")
    lends_frame = view and unconditional in ("svd", "mean")
    return view or lends_view, frame or lends_frame


def compose(
    view: Estimate | None,  # each [V, F, C, h, w]; None only where `needed` says so
    frame: Estimate | None,
    weights: Weights,
    view_guidance: Tensor,  # [V]
    frame_guidance: Tensor,  # [F]
    unconditional: Unconditional = "default",
) -> Tensor:  # [V, F, C, h, w]
    """The guided estimates of both models, weighted.

    `unconditional` says whose unconditional estimate both use: each its own, SV3D's, SVD's or their mean.
    """
    view, frame = _share_unconditional(view, frame, unconditional)
    parts = []
    if view is not None and weights.view.any():
        parts.append(weights.view[V_CELLS].to(view.cond) * view.guided(view_guidance[V_CELLS].to(view.cond)))
    if frame is not None and weights.frame.any():
        guided = frame.guided(frame_guidance[F_CELLS].to(frame.cond))
        parts.append(weights.frame[V_CELLS].to(guided) * guided)
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def _share_unconditional(
    view: Estimate | None, frame: Estimate | None, unconditional: Unconditional
) -> tuple[Estimate | None, Estimate | None]:
    if unconditional == "default" or view is None or frame is None:
        return view, frame
    mean = (view.uncond + frame.uncond) / 2
    lent = {"sv3d": view.uncond, "svd": frame.uncond, "mean": mean}[unconditional]
    return Estimate(lent, view.cond), Estimate(lent, frame.cond)
