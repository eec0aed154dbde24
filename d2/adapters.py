"""Other models in the matrix: plain functions and foreign networks as the denoisers that d2 composes.

`d2.generate` takes them in the place of its own UNets: `frame_denoiser` gets rows, a view's F frames, `view_denoiser`
columns, a moment's V views, with the last one the input's.  Both are called as f(x, sigma, cond): noisy latents
[B, T, C, h, w], their noise levels [B], and the reference picture of each of the B lines in `cond`
(d2.models.conditioner.Conditioning): its latent in `cond.concat` [B, T, C, h, w], its CLIP token in `cond.crossattn`.
They return the clean estimate, like x.  Each line is also asked for without its reference (both are zeros), for
guidance; a model that knows no guidance wants it at 1, and is then asked once.  The frame model's checkpoint gives the
autoencoder; the view model's is not needed beside a `view_denoiser`.

    def still(x, sigma, cond):  # the exact denoiser of N(reference, 0.05²) in every frame: nothing moves
        gain = 0.05**2 / (0.05**2 + sigma**2)
        return cond.concat + gain[:, None, None, None, None] * (x - cond.concat)

    unguided = ("frame_guidance_min=1", "frame_guidance_max=1")
    d2.generate("tests/data/toy.png", "runs/still", preset="tiny", frame_denoiser=still, sets=unguided)

(Latents of Stable Diffusion's autoencoder are d2.models.vae.SCALE_FACTOR times `cond.concat`.)  `DiffusersFrames` is
Stable Video Diffusion as diffusers holds it, with d2's conditioning:

    pipeline = diffusers.StableVideoDiffusionPipeline.from_pretrained(folder)
    d2.generate("cat.png", weights=folder, frame_denoiser=DiffusersFrames(pipeline.unet))

`sample` is the sampler alone, without pictures, for denoisers of the whole matrix: `rows` and `columns` make them of a
function of x and sigma, `d2.denoiser.Lines` of a network with guidance.

    def around(mean, spread):  # the posterior mean under N(mean, spread²), in closed form
        return lambda x, sigma: mean + spread**2 / (spread**2 + sigma**2) * (x - mean)

    latents = sample(columns(around(0.3, 0.5)), rows(around(0.5, 0.2)), (3, 4, 4, 8, 8), steps=20)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2.config import load
from d2.denoiser import Estimate, like, scalings
from d2.errors import InputError
from d2.models.conditioner import Conditioning
from d2.noise import matrix_noise, starting_point
from d2.sampler import MatrixDenoiser, SamplerConfig, State, plan, sample_matrix

Function = Callable[[Tensor, Tensor], Tensor]  # x [B, T, C, h, w] and sigma, a scalar -> the clean estimate, like x


def rows(function: Function) -> MatrixDenoiser:
    """A denoiser of whole rows (one view, T = F moments), without guidance: both estimates are the function's."""

    def denoise(x: Tensor, sigma: float) -> Estimate:
        found = like(x, function(x, torch.tensor(sigma, dtype=x.dtype, device=x.device)))
        return Estimate(found, found)

    return denoise


def columns(function: Function) -> MatrixDenoiser:
    """A denoiser of whole columns (one moment, T = V views), without guidance."""

    def transposed(x: Tensor, sigma: Tensor) -> Tensor:
        return function(x.transpose(0, 1), sigma).transpose(0, 1)

    return rows(transposed)


def sample(
    views: MatrixDenoiser,
    frames: MatrixDenoiser,
    shape: tuple[int, int, int, int, int],  # V, F, C, h, w
    seed: int = 0,
    callback: Callable[[State], None] = lambda state: None,
    **settings: Any,  # fields of d2.sampler.SamplerConfig
) -> Tensor:  # [V, F, C, h, w]
    """Samples a matrix from two denoisers, composed at every step as `d2 generate` composes its own.

    The last view stands at azimuth 0, where the frame model counts most.  Raises InputError for settings out of range
    and NumericalError, naming model and cell, where an estimate is not finite.
    """
    V, F, *latent = shape
    if min(shape) < 1:
        raise InputError(f"shape must be five positive numbers V, F, C, h, w, got {shape}")
    azimuth = torch.arange(1, V + 1, dtype=torch.float64) / V * (2 * torch.pi)
    worked_out = plan(load(SamplerConfig, settings), azimuth, F)

    def noise(stream: str, step: int) -> Tensor:
        return matrix_noise(seed, stream, step, V, F, tuple(latent))

    start = State(starting_point(noise("matrix/start", 0), float(worked_out.sigmas[0])))
    return sample_matrix(start, worked_out, views, frames, lambda step: noise("matrix/renoise/0", step), callback)


class DiffusersFrames:
    """The UNet of diffusers' StableVideoDiffusionPipeline as a frame denoiser, for d2.generate and d2.denoiser.Lines.

    D(x; sigma) = c_skip·x + c_out·F(c_in·x, ln(sigma)/4), EDM's scalings with v-prediction, as in UNetDenoiser; token
    and reference latent come with the conditioning, the three numbers are given here.
    """

    def __init__(
        self,
        unet: Any,  # diffusers.UNetSpatioTemporalConditionModel
        fps_id: float = 24.0,
        motion: float = 127.0,
        cond_aug: float = 0.02,
    ) -> None:
        self.unet = unet
        self.numbers = fps_id, motion, cond_aug

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,  # [B, T, C, h, w]
        sigma: Tensor,  # [B]
        cond: Conditioning,
    ) -> Tensor:  # like x
        c_skip, c_out, c_in, c_noise = scalings(sigma[:, None, None, None, None])
        dtype = next(self.unet.parameters()).dtype
        inputs = torch.cat([(c_in * x).to(dtype), cond.concat.to(dtype)], dim=2)
        token = cond.crossattn[:, :1].to(dtype)  # [B, 1, D]: the same for all T
        numbers = torch.tensor([self.numbers], dtype=dtype, device=x.device).expand(len(x), 3)
        predicted = self.unet(inputs, c_noise.flatten().to(dtype), token, numbers, return_dict=False)[0]
        return c_skip * x + c_out * predicted.to(x.dtype)

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Nothing is worth keeping between steps."""
        return cond
