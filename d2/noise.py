"""Gaussian noise that is a function of (seed, stream, step, cell), and FreeInit's re-use of it.

Whatever is batched, sharded or resumed, the same cell of the matrix gets the same numbers: each has a
generator of its own, and it always runs on the CPU in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def cell_noise(
    seed: int,
    stream: str,  # what the noise is for, such as "start" or "renoise"
    step: int,
    cell: Sequence[int],  # (v, f), or whatever names the cell
    shape: Sequence[int],
) -> Tensor:  # shape, N(0, 1), float32 on the CPU
    """The noise of one cell."""
    key = f"{seed}/{stream}/{step}/{'/'.join(str(int(i)) for i in cell)}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def matrix_noise(
    seed: int,
    stream: str,
    step: int,
    V: int,
    F: int,
    shape: Sequence[int],  # of one cell: (C, h, w)
) -> Tensor:  # [V, F, C, h, w], N(0, 1), float32 on the CPU
    """The noise of every cell of the matrix."""
    rows = [torch.stack([cell_noise(seed, stream, step, (v, f), shape) for f in range(F)]) for v in range(V)]
    return torch.stack(rows)


def starting_point(
    noise: Tensor,  # [..., C, h, w] N(0, 1)
    sigma: float,  # the first noise level
    latent: Tensor | None = None,  # broadcastable to noise: a reference's latent, as sampled
) -> Tensor:  # [..., C, h, w]
    """x at the first noise level: noise·sqrt(1+sigma²), or latent + sigma·noise where there is a latent.

    The second is the first with noise' = (latent + sigma·noise)/sqrt(1+sigma²) (`noise_from_mv`).
    """
    return noise * (1 + sigma**2) ** 0.5 if latent is None else latent + sigma * noise


def freeinit_noise(
    sample: Tensor,  # [V, F, C, h, w], the finished sample of the iteration before
    noise: Tensor,  # like sample: the noise it started from, N(0, 1)
    fresh: Tensor,  # like sample, N(0, 1)
    sigma: float,  # the first noise level
    mask: Tensor,  # [V, F, h, w] or [T, h, w] (schedule.low_pass)
) -> Tensor:  # like sample
    """Noise for the next iteration: the low frequencies of the noised sample, the high ones of fresh noise.

    FreeInit (Wu et al. 2023).  The sample is noised as the sampler starts: with the same noise, in
    units where x is noise·sqrt(1+sigma²).
    """
    dims = (*range(sample.ndim - mask.ndim - 1, sample.ndim - 3), -2, -1)
    noised = (sample + sigma * noise) / (1 + sigma**2) ** 0.5
    return mix_frequencies(noised, fresh, mask.unsqueeze(-3), dims)


def mix_frequencies(
    low: Tensor,  # [...]
    high: Tensor,  # like low
    mask: Tensor,  # broadcastable to low: the share kept of `low`, zero frequency in the middle
    dims: Sequence[int],  # the filtered dimensions
) -> Tensor:  # like low
    """The frequencies of `low` where the mask is 1, those of `high` where it is 0."""
    dims = tuple(dims)
    kept = torch.fft.ifftshift(mask.expand_as(low), dim=dims)
    spectrum = kept * torch.fft.fftn(low, dim=dims) + (1 - kept) * torch.fft.fftn(high, dim=dims)
    return torch.fft.ifftn(spectrum, dim=dims).real
