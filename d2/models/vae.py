"""The KL autoencoder of Stable Diffusion, and SVD's decoder that also looks along time.

Pictures are -1..1; a latent has 1/8 of their height and width.  Every GroupNorm here has eps 1e-6, but
for those of the temporal stacks (1e-5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from d2.models.blocks import GROUPS, ResBlock, Upsample

SCALE_FACTOR = 0.18215  # a sampled latent is the encoder's times this


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are Stable Diffusion's f8 autoencoder."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 4
    video_kernel_size: tuple[int, int, int] = (3, 1, 1)

    @property
    def factor(self) -> int:
        """Pixels of the picture to a pixel of the latent, each way."""
        return 2 ** (len(self.ch_mult) - 1)


class KLAutoencoder(nn.Module):
    """Encoder and decoder with the 1×1 convolutions of the original release.

    The conditioner of SVD and SV3D holds one and uses its encoder only; `decoder=False` leaves the rest out.
    """

    def __init__(self, config: VAEConfig, decoder: bool = True) -> None:
        super().__init__()
        z = config.z_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        if decoder:
            self.decoder = Decoder(config)
            self.post_quant_conv = nn.Conv2d(z, z, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def mode(
        self,
        x: Tensor,  # [B, 3, H, W] in -1..1
    ) -> Tensor:  # [B, z, h, w]
        """The most likely latent, not multiplied by SCALE_FACTOR."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(
        self,
        z: Tensor,  # [B, z, h, w], not scaled
    ) -> Tensor:  # [B, 3, H, W], about -1..1
        return self.decoder(self.post_quant_conv(z))


class FirstStage(nn.Module):
    """What a sampled latent is decoded with: SV3D's image decoder, or SVD's encoder and temporal decoder."""

    def __init__(self, config: VAEConfig, video: bool) -> None:
        super().__init__()
        self.video = video
        if video:
            self.encoder = Encoder(config)
        self.decoder = VideoDecoder(config) if video else Decoder(config)

    def encode(
        self,
        x: Tensor,  # [B, 3, H, W] in -1..1
        noise: Tensor,  # [B, z, h, w] N(0, 1)
    ) -> Tensor:  # [B, z, h, w]
        """A latent drawn from the encoder's distribution, multiplied by SCALE_FACTOR."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return SCALE_FACTOR * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise)

    def decode(
        self,
        z: Tensor,  # [T, z, h, w], as sampled
        chunk: int = 10,  # pictures at a time; the temporal decoder sees no further, so the seams show it
    ) -> Tensor:  # [T, 3, H, W], about -1..1
        """Pictures of one clip."""
        chunks = (z / SCALE_FACTOR).split(chunk)
        return torch.cat([self.decoder(part, len(part) if self.video else 1) for part in chunks])


class Encoder(nn.Module):
    """Picture -> mean and log-variance of its latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.ch
        for level, width in enumerate(widths):
            inputs = [before] + [width] * (config.num_res_blocks - 1)
            downsample = Downsample(width) if level < len(widths) - 1 else None
            self.down.append(Level((ResnetBlock(c, width) for c in inputs), downsample=downsample))
            before = width
        self.mid = Middle(ResnetBlock(before, before), ResnetBlock(before, before), before)
        self.norm_out = nn.GroupNorm(GROUPS, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 2 * config.z_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W] in -1..1; H, W multiples of the factor
    ) -> Tensor:  # [B, 2 z, h, w], mean | log-variance, not scaled
        x = self.conv_in(x)
        for level in self.down:
            x = level(x, 1)
        return self.conv_out(F.silu(self.norm_out(self.mid(x, 1))))


class Decoder(nn.Module):
    """Latent -> picture, each on its own."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, before, 3, padding=1)
        self.mid = Middle(self.block(before, before, config), self.block(before, before, config), before)
        levels = []
        for number, width in reversed(list(enumerate(widths))):
            inputs = [before] + [width] * config.num_res_blocks
            upsample = Upsample(width) if number > 0 else None
            levels.append(Level((self.block(c, width, config) for c in inputs), upsample=upsample))
            before = width
        self.up = nn.ModuleList(reversed(levels))  # the checkpoint counts from the finest
        self.norm_out = nn.GroupNorm(GROUPS, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, config.out_ch, 3, padding=1)

    @staticmethod
    def block(channels: int, out_channels: int, config: VAEConfig) -> nn.Module:
        return ResnetBlock(channels, out_channels)

    def forward(
        self,
        z: Tensor,  # [B T, z, h, w], not scaled
        T: int = 1,  # pictures in each clip; a still decoder ignores it
    ) -> Tensor:  # [B T, 3, H, W], about -1..1
        x = self.mid(self.conv_in(z), T)
        for level in reversed(self.up):
            x = level(x, T)
        return self.conv_out(F.silu(self.norm_out(x)))


class VideoDecoder(Decoder):
    """SVD's decoder: every residual block and the output look along the T pictures of a clip."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        kernel = config.video_kernel_size
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        time_mix = nn.Conv3d(config.out_ch, config.out_ch, kernel, padding=padding)
        self.conv_out.add_module("time_mix_conv", time_mix)

    @staticmethod
    def block(channels: int, out_channels: int, config: VAEConfig) -> nn.Module:
        return VideoResnetBlock(channels, out_channels, config.video_kernel_size)

    def forward(
        self,
        z: Tensor,  # [B T, z, h, w], not scaled
        T: int = 1,
    ) -> Tensor:  # [B T, 3, H, W], about -1..1
        clips = rearrange(super().forward(z, T), "(b t) c h w -> b c t h w", t=T)
        return rearrange(self.get_submodule("conv_out.time_mix_conv")(clips), "b c t h w -> (b t) c h w")


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a skip."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [B T, C, h, w]
        T: int,  # pictures in each clip
    ) -> Tensor:  # [B T, out_channels, h, w]
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VideoResnetBlock(ResnetBlock):
    """A ResnetBlock, then a temporal one; a·temporal + (1-a)·spatial, the UNet's mix the other way round."""

    def __init__(self, channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(channels, out_channels)
        self.time_stack = ResBlock(out_channels, out_channels, None, kernel)
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,  # [B T, C, h, w]
        T: int,
    ) -> Tensor:  # [B T, out_channels, h, w]
        clips = rearrange(super().forward(x, T), "(b t) c h w -> b c t h w", t=T)
        mixed = torch.lerp(clips, self.time_stack(clips), torch.sigmoid(self.mix_factor))
        return rearrange(mixed, "b c t h w -> (b t) c h w")


class Level(nn.Module):
    """The blocks at one resolution and the way to the next."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.downsample = downsample
        self.upsample = upsample

    def forward(
        self,
        x: Tensor,  # [B T, C, h, w]
        T: int,  # pictures in each clip
    ) -> Tensor:  # [B T, C', h', w'], at the next resolution
        for block in self.block:
            x = block(x, T)
        resample = self.downsample or self.upsample
        return resample(x) if resample is not None else x


class Middle(nn.Module):
    """Two blocks around attention within the picture."""

    def __init__(self, block_1: nn.Module, block_2: nn.Module, channels: int) -> None:
        super().__init__()
        self.block_1 = block_1
        self.attn_1 = AttnBlock(channels)
        self.block_2 = block_2

    def forward(
        self,
        x: Tensor,  # [B T, C, h, w]
        T: int,  # pictures in each clip
    ) -> Tensor:  # like x
        return self.block_2(self.attn_1(self.block_1(x, T)), T)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of each picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # like x
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves height and width; the padding stands at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, h/2, w/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))
