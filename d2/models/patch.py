"""A small autoencoder for small models: patches on their principal components, and a decoder that cleans them.

Encoding is linear, one vector a patch, so training needs no second network in its loop; white is the origin.
Decoding is the transpose plus what a few convolutions add, which see neighbouring patches and so neither
speckle nor show the patches' borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from d2.models.blocks import ResBlock


@dataclass(frozen=True)
class PatchConfig:
    """A latent has 1/patch of the picture's height and width."""

    patch: int = 4  # pixels
    z_channels: int = 24
    width: int = 64  # of the decoder
    num_res_blocks: int = 2
    norm_groups: int = 8

    @property
    def factor(self) -> int:
        """Pixels of the picture to a pixel of the latent, each way."""
        return self.patch


class PatchEncoder(nn.Module):
    """z = W (x - white) for every patch."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, config.z_channels, config.patch, stride=config.patch, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.project.weight.dtype

    def mode(
        self,
        x: Tensor,  # [B, 3, H, W] in -1..1; H, W multiples of the patch
    ) -> Tensor:  # [B, z, h, w]
        return self.project(x - 1)


class PatchDecoder(nn.Module):
    """The encoder's transpose, and a correction from each patch's surroundings."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.expand = nn.ConvTranspose2d(config.z_channels, 3, config.patch, stride=config.patch, bias=False)
        self.conv_in = nn.Conv2d(config.z_channels, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(
            ResBlock(config.width, config.width, None, (3, 3), config.norm_groups) for _ in range(config.num_res_blocks)
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, config.width)
        self.conv_out = nn.Conv2d(config.width, 3 * config.patch**2, 3, padding=1)

    def forward(
        self,
        z: Tensor,  # [B, z, h, w]
    ) -> Tensor:  # [B, 3, H, W], about -1..1
        h = self.conv_in(z)
        for block in self.blocks:
            h = block(h)
        correction = self.conv_out(F.silu(self.norm_out(h)))
        return 1 + self.expand(z) + F.pixel_shuffle(correction, self.patch)


class PatchFirstStage(nn.Module):
    """Encoder and decoder of sampled latents; the same protocol as vae.FirstStage."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.encoder = PatchEncoder(config)
        self.decoder = PatchDecoder(config)

    def encode(
        self,
        x: Tensor,  # [B, 3, H, W] in -1..1
        noise: Tensor,  # [B, z, h, w]; the encoder is deterministic and has no use for it
    ) -> Tensor:  # [B, z, h, w]
        return self.encoder.mode(x)

    def decode(
        self,
        z: Tensor,  # [T, z, h, w]
        chunk: int = 10,  # pictures at a time
    ) -> Tensor:  # [T, 3, H, W], about -1..1
        return torch.cat([self.decoder(part) for part in z.split(chunk)])

    @torch.no_grad()
    def set_basis(
        self,
        basis: Tensor,  # [z, 3, patch, patch], orthonormal rows
        gain: float,  # latents are projections times this
    ) -> None:
        """Encoder and the linear part of the decoder from principal components; the correction starts at zero."""
        self.encoder.project.weight.copy_(gain * basis)
        self.decoder.expand.weight.copy_(basis / gain)
        nn.init.zeros_(self.decoder.conv_out.weight)
        nn.init.zeros_(self.decoder.conv_out.bias)  # type: ignore[arg-type]


def principal_components(
    pictures: Tensor,  # [N, 3, H, W] in -1..1
    config: PatchConfig,
) -> tuple[Tensor, float]:  # [z, 3, patch, patch] orthonormal, and the gain that gives latents unit rms
    """The patches' leading directions around white, by the eigenvectors of their second moments."""
    p = config.patch
    patches = rearrange(pictures - 1, "n c (h p) (w q) -> (n h w) (c p q)", p=p, q=p).double()
    _, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    basis = vectors.flip(1)[:, : config.z_channels].T
    rms = (patches @ basis.T).square().mean().sqrt()
    return rearrange(basis, "z (c p q) -> z c p q", c=3, p=p).float(), float(1 / rms)
