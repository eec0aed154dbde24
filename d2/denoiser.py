"""Denoisers: EDM preconditioning of a network, guidance pairs, and whole rows or columns of the matrix.

A denoiser maps a noisy latent to the estimate of the clean one.  It is pure: same input, same output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from d2.models.blocks import Blend
from d2.models.conditioner import Conditioning, join
from d2.models.unet import VideoUNet


class Denoiser(Protocol):
    """Anything that estimates clean sequences from noisy ones."""

    def __call__(
        self,
        x: Tensor,  # [B, T, C, h, w], float32
        sigma: Tensor,  # [B], the noise's standard deviation
        cond: Conditioning,  # B sequences of T
    ) -> Tensor:  # like x
        ...

    def prepare(self, cond: Conditioning) -> Conditioning:
        """`cond` with whatever the denoiser can compute from it once for the run."""
        ...


class Scalings(NamedTuple):
    """EDM coefficients, each like sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Estimate(NamedTuple):
    """The clean latent as guessed without and with the reference."""

    uncond: Tensor
    cond: Tensor

    def guided(
        self,
        scale: Tensor,  # broadcastable to the estimates
    ) -> Tensor:
        """D = Du + g·(Dc - Du), classifier-free guidance."""
        return self.uncond + scale * (self.cond - self.uncond)


def scalings(
    sigma: Tensor,  # any shape, > 0
) -> Scalings:
    """SVD's preconditioning: v-prediction (sigma_data = 1) with EDM's c_noise (Karras et al. 2022)."""
    square = sigma**2 + 1
    return Scalings(1 / square, -sigma / square.sqrt(), 1 / square.sqrt(), 0.25 * sigma.log())


class UNetDenoiser:
    """A VideoUNet as a denoiser: D(x; sigma) = c_skip·x + c_out·F(c_in·x; c_noise)."""

    def __init__(self, unet: VideoUNet, blend: Blend | None = None) -> None:
        self.unet = unet
        self.blend = blend
        self.dtype = next(unet.parameters()).dtype

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: Tensor,  # [B]
        cond: Conditioning,
    ) -> Tensor:  # like x
        T = x.shape[1]
        c_skip, c_out, c_in, c_noise = scalings(sigma.repeat_interleave(T)[:, None, None, None])
        tokens = cond.tokens or self.prepare(cond).tokens
        assert tokens is not None
        pictures = rearrange(x, "b t c h w -> (b t) c h w")
        concat, vector = cond.concat.flatten(0, 1), cond.vector.flatten(0, 1)
        inputs = torch.cat([(c_in * pictures).to(self.dtype), concat], dim=1)
        output = self.unet(inputs, c_noise.flatten(), tokens, vector, T, self.blend)
        return rearrange(c_skip * pictures + c_out * output.float(), "(b t) c h w -> b t c h w", t=T)

    @torch.no_grad()
    def prepare(self, cond: Conditioning) -> Conditioning:
        """With what the network's cross-attention takes from the single CLIP token."""
        return cond.with_tokens(self.unet.project_context(cond.crossattn.flatten(0, 1), cond.crossattn.shape[1]))


class AnalyticDenoiser:
    """The exact posterior mean E[x0 | x] under the prior x0 ~ N(cond.concat, S), each pixel alone.

    D = m + S(S + sigma²)^-1 (x - m).  With it the sampler's distribution is known in closed form.
    """

    def __init__(
        self,
        covariance: Tensor,  # [T, T] S, symmetric, positive semi-definite
    ) -> None:
        self.variance, self.basis = torch.linalg.eigh(covariance)

    def __call__(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: Tensor,  # [B]
        cond: Conditioning,
    ) -> Tensor:  # like x
        shrink = self.variance / (self.variance + sigma[:, None] ** 2)  # [B, T]
        gain = torch.einsum("ik, bk, jk -> bij", self.basis, shrink, self.basis)
        return cond.concat + torch.einsum("bij, bjchw -> bichw", gain, x - cond.concat)

    def prepare(self, cond: Conditioning) -> Conditioning:
        return cond


class Lines:
    """A denoiser over all rows, or all columns, of the matrix, each with its guidance pair.

    `in_flight` lines go through one evaluation; 1 makes the result independent of how lines are shared out.
    A denoiser whose columns look at each other (conv_blend) needs all of them in flight.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditions: Sequence[Conditioning],  # one of B = 1 for each line
        axis: Literal["rows", "columns"],
        in_flight: int = 1,
    ) -> None:
        self.denoiser = denoiser
        self.axis = axis
        self.in_flight = in_flight
        self.cond = [denoiser.prepare(c) for c in conditions]  # once for the run
        self.uncond = [denoiser.prepare(c.unconditional()) for c in conditions]

    def __call__(
        self,
        x: Tensor,  # [V, F, C, h, w]
        sigma: float,
    ) -> Estimate:  # each like x
        """Estimates of every cell."""
        lines = x if self.axis == "rows" else x.transpose(0, 1)
        if len(lines) != len(self.cond):
            raise ValueError(f"{len(lines)} {self.axis} and {len(self.cond)} conditions")
        chunks = [slice(i, i + self.in_flight) for i in range(0, len(lines), self.in_flight)]
        pairs = [self.denoise(lines[chunk], sigma, chunk) for chunk in chunks]
        uncond, cond = (torch.cat(part) for part in zip(*pairs, strict=True))
        if self.axis == "columns":
            return Estimate(uncond.transpose(0, 1), cond.transpose(0, 1))
        return Estimate(uncond, cond)

    def denoise(
        self,
        lines: Tensor,  # [B, T, C, h, w]
        sigma: float,
        chosen: slice,  # which lines they are
    ) -> Estimate:  # each like lines
        """Estimates of some lines, by one evaluation on [unconditional ; conditional]."""
        both = join(self.uncond[chosen] + self.cond[chosen])
        x = torch.cat([lines, lines]).to(both.concat.device)
        levels = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        return Estimate(*self.denoiser(x, levels, both).to(lines.device).chunk(2))
