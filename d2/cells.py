"""Rows or columns of a finished matrix that are sampled again while the rest stays as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2.denoiser import Estimate, MatrixDenoiser
from d2.errors import InputError
from d2.noise import starting_point

FIVE = None, None, None  # behind [V, F], for [V, F, C, h, w]


@dataclass(frozen=True)
class Redo:
    """Which lines of the matrix are sampled anew."""

    axis: Literal["views", "frames"]
    lines: tuple[int, ...]

    def mask(self, V: int, F: int) -> Tensor:  # [V, F] bool
        """Where cells are sampled anew."""
        chosen = torch.zeros(V, F, dtype=torch.bool)
        if self.axis == "views":
            chosen[list(self.lines)] = True
        else:
            chosen[:, list(self.lines)] = True
        return chosen

    def along(self, model_axis: Literal["rows", "columns"]) -> tuple[int, ...] | None:
        """The only lines a model has to denoise; None where that is all of them."""
        return self.lines if (self.axis, model_axis) in (("views", "rows"), ("frames", "columns")) else None


def parse(text: str, V: int, F: int) -> Redo:
    """`views=3,4` or `frames=0`; raises InputError for anything else and for lines that are not there."""
    found = re.fullmatch(r"(views|frames)=(\d{1,6}(?:,\d{1,6})*)", text.replace(" ", ""))
    if found is None:
        raise InputError(f"--cells {text!r}: expected views=3,4 or frames=0,1")
    lines = tuple(sorted({int(number) for number in found[2].split(",")}))
    count = V if found[1] == "views" else F
    if lines[-1] >= count:
        raise InputError(f"--cells {text!r}: {found[1]} are 0 to {count - 1}")
    return Redo("views" if found[1] == "views" else "frames", lines)


def kept_start(
    noise: Tensor,  # [V, F, C, h, w] N(0, 1)
    sigma: float,  # the first noise level
    known: Tensor,  # like noise: latents of the finished matrix
    chosen: Tensor,  # [V, F] bool
) -> Tensor:  # like noise
    """Noise where cells are sampled anew, the known latents under noise elsewhere."""
    anew, kept = starting_point(noise, sigma), starting_point(noise, sigma, known)
    return torch.where(chosen[..., *FIVE], anew, kept)


def keeping(
    model: MatrixDenoiser,  # of `lines` along its axis, or of all
    known: Tensor,  # [V, F, C, h, w]
    chosen: Tensor,  # [V, F] bool
    axis: Literal["rows", "columns"],
    lines: tuple[int, ...] | None,
) -> MatrixDenoiser:
    """A denoiser that knows the clean cells it is to keep, so that the loop leads back to them.

    Cells sampled anew see the kept ones at the noise level of the step, as in replacement in-painting.
    """
    dim = 0 if axis == "rows" else 1
    index = None if lines is None else torch.tensor(lines)

    def denoise(x: Tensor, sigma: float) -> Estimate:
        if index is None:
            found = model(x, sigma)
        else:
            part = model(x.index_select(dim, index), sigma)
            found = Estimate(*(known.index_copy(dim, index, guess) for guess in part))
        return Estimate(*(torch.where(chosen[..., *FIVE], guess, known) for guess in found))

    return denoise
