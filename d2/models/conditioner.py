"""From a picture and a few numbers to what the networks are conditioned on.

Three tensors: `crossattn`, one CLIP token of the clean picture; `concat`, its latent; `vector`, sinusoids of
numbers (SVD: frame rate, motion, augmentation; SV3D: augmentation, polar angle, azimuth).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from d2.models.blocks import sinusoid
from d2.models.clip import OpenCLIP, ViTConfig
from d2.models.patch import PatchConfig, PatchEncoder
from d2.models.unet import ContextTokens, Deep
from d2.models.vae import KLAutoencoder, VAEConfig

SVD_SLOTS = ("image", "fps", "motion", "latent", "augmentation")  # the checkpoint numbers its embedders so
SV3D_SLOTS = ("image", "latent", "augmentation", "polar", "azimuth")


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What B sequences of T pictures are conditioned on; dtype and device are those of the network."""

    crossattn: Tensor  # [B, T, D]
    concat: Tensor  # [B, T, C, h, w], not multiplied by the latent scale factor
    vector: Tensor  # [B, T, A]
    tokens: ContextTokens | None = None  # the network's projection of crossattn, where it is cached
    deep: Deep | None = None  # where a network leaves or finds what it need not compute again

    def unconditional(self) -> Conditioning:
        """Without the picture; the numbers stay."""
        return Conditioning(torch.zeros_like(self.crossattn), torch.zeros_like(self.concat), self.vector)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        crossattn, concat, vector = (t.to(device, dtype) for t in (self.crossattn, self.concat, self.vector))
        return Conditioning(crossattn, concat, vector)

    def with_tokens(self, tokens: ContextTokens) -> Conditioning:
        return dataclasses.replace(self, tokens=tokens)


def join(conditions: list[Conditioning]) -> Conditioning:
    """Sequences one after another along B; cached tokens stay where all have them."""
    crossattn = torch.cat([c.crossattn for c in conditions])
    concat = torch.cat([c.concat for c in conditions])
    vector = torch.cat([c.vector for c in conditions])
    cached = [c.tokens for c in conditions if c.tokens is not None]
    tokens = join_tokens(cached) if len(cached) == len(conditions) else None
    return Conditioning(crossattn, concat, vector, tokens)


def join_tokens(parts: list[ContextTokens]) -> ContextTokens:
    """The tokens of every block one after another along B."""
    joined = []
    for transformer in zip(*parts, strict=True):
        blocks = zip(*transformer, strict=True)
        joined.append([(torch.cat([t for t, _ in block]), torch.cat([f for _, f in block])) for block in blocks])
    return joined


class Conditioner(nn.Module):
    """The two networks that look at the reference picture, under the checkpoint's names."""

    def __init__(
        self, slots: tuple[str, ...], clip: ViTConfig, vae: VAEConfig | PatchConfig, decoder: bool = False
    ) -> None:
        super().__init__()
        self.slots = slots
        self.embedders = nn.ModuleList(nn.Module() for _ in slots)
        self.embedders[slots.index("image")].add_module("open_clip", nn.ModuleDict({"model": OpenCLIP(clip)}))
        encoder = PatchEncoder(vae) if isinstance(vae, PatchConfig) else KLAutoencoder(vae, decoder)
        self.embedders[slots.index("latent")].add_module("encoder", encoder)

    @property
    def clip(self) -> OpenCLIP:
        return cast(OpenCLIP, self.get_submodule(f"embedders.{self.slots.index('image')}.open_clip.model"))

    @property
    def vae(self) -> KLAutoencoder | PatchEncoder:
        return cast(KLAutoencoder | PatchEncoder, self.get_submodule(f"embedders.{self.slots.index('latent')}.encoder"))

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in -1..1
        noise: Tensor,  # [B, 3, H, W] N(0, 1)
        cond_aug: float,  # standard deviation of the noise added to the picture before the VAE
    ) -> tuple[Tensor, Tensor]:  # [B, D], [B, C, h, w]
        """The token of the clean picture and the latent of the noisy one."""
        noisy = (image + cond_aug * noise).to(self.vae.dtype)
        return self.clip(image), self.vae.mode(noisy)


def condition(
    token: Tensor,  # [B, D]
    latent: Tensor,  # [B, C, h, w]
    vector: Tensor,  # [T, A]
) -> Conditioning:
    """The same picture for all T members of each sequence."""
    batch, T = len(token), len(vector)
    return Conditioning(
        token[:, None].expand(-1, T, -1),
        latent[:, None].expand(-1, T, -1, -1, -1),
        vector[None].expand(batch, -1, -1).to(token),
    )


def svd_vector(
    fps_id: float,  # frames per second, as it is (diffusers subtracts 1)
    motion_bucket_id: float,  # 0..255, more moves more
    cond_aug: float,
    T: int,
    dim: int = 256,
) -> Tensor:  # [T, 3 dim] float32
    """SVD's numbers, the same for every frame."""
    embedded = sinusoid(torch.tensor([fps_id, motion_bucket_id, cond_aug]), dim)
    return rearrange(embedded, "n d -> 1 (n d)").repeat(T, 1)


def sv3d_vector(
    cond_aug: float,
    polar: Tensor,  # [V] rad, from the zenith
    azimuth: Tensor,  # [V] rad, the last view's is 2 pi
    dim: int = 256,
) -> Tensor:  # [V, 5 dim] float32
    """SV3D's numbers for every view."""
    augmentation = sinusoid(torch.full((len(polar),), cond_aug), dim)
    return torch.cat([augmentation, sinusoid(polar, 2 * dim), sinusoid(azimuth, 2 * dim)], dim=1)


def sv3d_angles(
    elevation: Tensor,  # [V] rad, absolute elevation of each target view
    azimuth: Tensor,  # [V] rad; the last view is the input's
) -> tuple[Tensor, Tensor]:  # [V] rad, [V] rad
    """Polar angle and azimuth as SV3D counts them: from the zenith, and from the input view (2 pi)."""
    turned = torch.remainder(azimuth - azimuth[-1], 2 * math.pi)
    turned[-1] = 2 * math.pi
    return math.pi / 2 - elevation, turned
