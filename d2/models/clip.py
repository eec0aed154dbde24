"""OpenCLIP's image encoder (ViT), from a picture to one embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """The defaults are ViT-H/14."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_ratio: float = 4.0
    output_dim: int = 1024


class OpenCLIP(nn.Module):
    """The picture's side of CLIP, under the names `visual.*`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.visual = VisionTransformer(config)

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in -1..1, any size
    ) -> Tensor:  # [B, output_dim]
        """The embedding of a picture, preprocessed as SVD and SV3D were trained."""
        prepared = preprocess(image.float(), self.visual.config.image_size)
        return self.visual(prepared.to(self.visual.proj.dtype))


class VisionTransformer(nn.Module):
    """Patches and a class token through pre-norm blocks; the class token's output, projected."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, patches = config.width, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + patches, width))
        self.proj = nn.Parameter(torch.zeros(width, config.output_dim))
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,  # [B, 3, image_size, image_size], normalised
    ) -> Tensor:  # [B, output_dim]
        patches = rearrange(self.conv1(x), "b c h w -> b (h w) c")
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Transformer(nn.Module):
    """The blocks, one after another."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))

    def forward(
        self,
        x: Tensor,  # [B, N, width]
    ) -> Tensor:  # like x
        return self.resblocks(x)


class Block(nn.Module):
    """Self-attention, then a perceptron, each added to its input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = SelfAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = Perceptron(config.width, int(config.width * config.mlp_ratio))

    def forward(
        self,
        x: Tensor,  # [B, N, width]
    ) -> Tensor:  # like x
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Perceptron(nn.Module):
    """Two layers around the exact GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(
        self,
        x: Tensor,  # [B, N, width]
    ) -> Tensor:  # like x
        return self.c_proj(F.gelu(self.c_fc(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention with q, k and v in one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,  # [B, N, width]
    ) -> Tensor:  # like x
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


def preprocess(
    image: Tensor,  # [B, 3, H, W] in -1..1
    size: int,
) -> Tensor:  # [B, 3, size, size], normalised by MEAN and STD
    """Gaussian blur against aliasing where the picture shrinks, bicubic resize with aligned corners.

    Corner alignment and the blur's kernel size are those SVD was trained with; other ways to resize give
    another embedding.
    """
    factors = [length / size for length in image.shape[-2:]]
    if max(factors) > 1:
        image = blur(image, factors)
    image = F.interpolate(image, size=(size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(c, device=image.device)[:, None, None] for c in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


def blur(
    image: Tensor,  # [B, C, H, W]
    factors: list[float],  # input / output, for height and width
) -> Tensor:  # [B, C, H, W]
    """Separable Gaussian with sigma (factor-1)/2 pixels, mirrored at the border."""
    channels = image.shape[1]
    for axis, factor in zip((2, 3), factors, strict=True):
        sigma = max((factor - 1) / 2, 0.001)
        length = int(max(4 * sigma, 3)) | 1  # odd
        offsets = torch.arange(length, device=image.device) - length // 2
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).to(image.dtype).repeat(channels, 1)
        pad, kernel = length // 2, kernel[:, None, :, None] if axis == 2 else kernel[:, None, None, :]
        image = F.pad(image, (0, 0, pad, pad) if axis == 2 else (pad, pad, 0, 0), mode="reflect")
        image = F.conv2d(image, kernel, groups=channels)
    return image
