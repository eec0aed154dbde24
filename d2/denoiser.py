"""Denoisers: EDM preconditioning of a network, guidance pairs, and whole rows or columns of the matrix.

A denoiser maps a noisy latent to the estimate of the clean one.  It is pure: same input, same output.  What it
may leave behind for another evaluation lies in its input too (Conditioning.deep).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from d2.errors import InputError
from d2.models.blocks import Blend
from d2.models.conditioner import Conditioning, join
from d2.models.unet import Deep, VideoUNet


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


MatrixDenoiser = Callable[[Tensor, float], Estimate]  # x [V, F, C, h, w] and sigma -> estimates like x


def in_turn(
    views: MatrixDenoiser | None,  # every column
    frames: MatrixDenoiser | None,  # every row
    x: Tensor,  # [V, F, C, h, w]
    sigma: float,
) -> tuple[Estimate | None, Estimate | None]:
    """What both models make of the same matrix, one model after the other."""
    return views(x, sigma) if views else None, frames(x, sigma) if frames else None


def scalings(
    sigma: Tensor,  # any shape, > 0
    sigma_data: float = 1.0,  # the data's standard deviation; SVD's v-prediction is the case of 1
) -> Scalings:
    """EDM's preconditioning (Karras et al. 2022, table 1), with v-prediction's sign of c_out."""
    square = sigma**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / square, -sigma * sigma_data / square.sqrt(), 1 / square.sqrt()
    return Scalings(c_skip, c_out, c_in, 0.25 * sigma.log())


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
        return self.estimate(x, sigma, cond if cond.tokens else self.prepare(cond))

    @torch.no_grad()
    def prepare(self, cond: Conditioning) -> Conditioning:
        """With what the network's cross-attention takes from the single CLIP token."""
        return self.look(cond)

    def look(self, cond: Conditioning) -> Conditioning:
        """The same, for training too."""
        return cond.with_tokens(self.unet.project_context(cond.crossattn.flatten(0, 1), cond.crossattn.shape[1]))

    def estimate(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: Tensor,  # [B]
        cond: Conditioning,  # prepared
    ) -> Tensor:  # like x
        c_skip, c_out, c_in, c_noise = scalings(sigma[:, None, None, None, None])
        return c_skip * x + c_out * self.network(c_in * x, c_noise, cond)

    def network(
        self,
        x: Tensor,  # [B, T, C, h, w], scaled
        c_noise: Tensor,  # [B, 1, 1, 1, 1]
        cond: Conditioning,
    ) -> Tensor:  # [B, T, out_channels, h, w], float32
        T = x.shape[1]
        assert cond.tokens is not None
        inputs = torch.cat([x.to(self.dtype), cond.concat], dim=2).flatten(0, 1)
        noise = c_noise.flatten().repeat_interleave(T)
        output = self.unet(inputs, noise, cond.tokens, cond.vector.flatten(0, 1), T, self.blend, cond.deep)
        return rearrange(output.float(), "(b t) c h w -> b t c h w", t=T)


class GatedDenoiser(UNetDenoiser):
    """EDM preconditioning around the reference, with a gate on the skip: what small networks learn fastest.

    D = m + c_skip·(1 - G)·(x - m) + c_out·A, (A, G) = F(c_in·(x - m); c_noise).  m is the reference's latent
    where a picture shows the reference's view (all frames of a row, the last view of a column), 0 elsewhere.
    Half the network's channels are the gate, by which noise of many dimensions need not pass through its trunk.
    """

    def __init__(
        self,
        unet: VideoUNet,
        sigma_data: float,
        around: Literal["all", "last"],  # which of the T pictures show the reference's view
        blend: Blend | None = None,
    ) -> None:
        super().__init__(unet, blend)
        self.sigma_data = sigma_data
        self.around = around

    def estimate(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: Tensor,  # [B]
        cond: Conditioning,  # prepared
    ) -> Tensor:  # like x
        c_skip, c_out, c_in, c_noise = scalings(sigma[:, None, None, None, None], self.sigma_data)
        m = cond.concat.float()
        if self.around == "last":
            m = torch.cat([torch.zeros_like(m[:, :-1]), m[:, -1:]], dim=1)
        rest = x - m
        A, G = self.network(c_in * rest, c_noise, cond).chunk(2, dim=2)
        return m + c_skip * (1 - G) * rest + c_out * A


class OwnDenoiser:
    """A function of the user's, (x, sigma, cond) -> denoised, as a Denoiser that is looked at.

    Raises InputError where it returns anything but a tensor like x.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Conditioning], Tensor]) -> None:
        self.function = function
        self.name: str = getattr(function, "__qualname__", type(function).__qualname__)

    def __call__(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: Tensor,  # [B]
        cond: Conditioning,
    ) -> Tensor:  # like x
        with torch.no_grad():
            return like(x, self.function(x, sigma, cond), self.name)

    def prepare(self, cond: Conditioning) -> Conditioning:
        return cond


def like(x: Tensor, found: Tensor, name: str = "a denoiser") -> Tensor:  # like x
    """What a denoiser made of `x`; raises InputError where that has another shape."""
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{name} returned {got} for {list(x.shape)}; expected a tensor of the same shape")
    return found.to(x)


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
    With `halves` the two members of a pair are evaluated one after the other, which takes half the memory.
    At noise levels above `guided_from` nothing is guided: the unconditional half of each pair is left out.
    At the levels of `shallow_at` what each half of each line left in its last whole evaluation is reused instead of
    computed; the first level is not among them (sampler.Plan.shallow_at).
    A denoiser whose columns look at each other (conv_blend) needs all of them in flight.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditions: Sequence[Conditioning],  # one of B = 1 for each line
        axis: Literal["rows", "columns"],
        in_flight: int = 1,
        guided_from: float = math.inf,
        halves: bool = False,
        shallow_at: Collection[float] = (),
    ) -> None:
        self.denoiser = denoiser
        self.axis = axis
        self.in_flight = in_flight
        self.guided_from = guided_from
        self.halves = halves
        self.shallow_at = frozenset(shallow_at)
        self.deep: dict[Conditioning, Tensor] = {}  # of each half of each line: [T, C, h, w]
        self.cond = [denoiser.prepare(c) for c in conditions]  # once for the run
        self.uncond = [denoiser.prepare(c.unconditional()) for c in conditions] if guided_from > 0 else []

    def __call__(
        self,
        x: Tensor,  # [V, F, C, h, w]
        sigma: float,
    ) -> Estimate:  # each like x
        """Estimates of every cell."""
        lines = x if self.axis == "rows" else x.transpose(0, 1)
        if len(lines) != len(self.cond):
            raise ValueError(f"{len(lines)} {self.axis} and {len(self.cond)} conditions")
        here = lines.to(
            self.cond[0].concat.device
        ).contiguous()  # once a pass: nothing waits for the device between two lines
        chunks = [slice(i, i + self.in_flight) for i in range(0, len(lines), self.in_flight)]
        pairs = [self.denoise(here[chunk], sigma, chunk) for chunk in chunks]
        cond = torch.cat([pair.cond for pair in pairs]).to(x.device)
        uncond = torch.cat([pair.uncond for pair in pairs]).to(x.device) if sigma <= self.guided_from else cond
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
        if sigma > self.guided_from:
            estimate = self.evaluate(lines, sigma, self.cond[chosen])
            return Estimate(estimate, estimate)
        if self.halves:
            return Estimate(*(self.evaluate(lines, sigma, half[chosen]) for half in (self.uncond, self.cond)))
        return Estimate(
            *self.evaluate(torch.cat([lines, lines]), sigma, self.uncond[chosen] + self.cond[chosen]).chunk(2)
        )

    def evaluate(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: float,
        conditions: list[Conditioning],  # one for each of B
    ) -> Tensor:  # like x
        levels = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        joined = join(conditions)
        if not self.shallow_at:
            return self.denoiser(x, levels, joined)
        shallow = sigma in self.shallow_at
        deep = Deep(torch.cat([self.deep[half] for half in conditions]) if shallow else None)
        estimate = self.denoiser(x, levels, dataclasses.replace(joined, deep=deep))
        if not shallow and deep.features is not None:
            # Copies: a CUDA graph will write to the same memory again.
            self.deep |= zip(conditions, (part.clone() for part in deep.features.chunk(len(x))), strict=True)
        return estimate
