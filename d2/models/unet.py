"""VideoUNet, the denoising network of SVD and SV3D: a 2D U-Net whose blocks also look along T pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from d2.models.blocks import (
    GROUPS,
    Blend,
    Mix,
    TemporalBlock,
    TransformerBlock,
    Upsample,
    VideoResBlock,
    sinusoid,
)

# One entry per transformer of the network: what its spatial and its temporal blocks take from the context,
# [B T, 1, C] and [B, 1, C] for each block.  Constant over a run.
ContextTokens = list[list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are SVD-XT; SV3D differs in adm_in_channels only."""

    in_channels: int = 8  # noisy latent | conditioning latent
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (1, 2, 4)  # down-sampling factors whose blocks have attention
    num_head_channels: int = 64
    transformer_depth: int = 1
    context_dim: int = 1024
    adm_in_channels: int = 768
    video_kernel_size: tuple[int, int, int] = (3, 1, 1)
    norm_groups: int = GROUPS


@dataclass(eq=False)
class Deep:
    """What the last stage of a network takes from all the others: an evaluation fills it, or spares them where it is.

    Reusing it between neighbouring noise levels is DeepCache (Ma et al. 2023) at its shallowest branch.
    """

    features: Tensor | None = None  # [B T, C, h, w]


SVD_XT = UNetConfig()
SV3D_P = UNetConfig(adm_in_channels=1280)


class VideoUNet(nn.Module):
    """F(x; c_noise, context, vector) of the EDM preconditioning (Karras et al. 2022, eq. 7)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        label = nn.Sequential(nn.Linear(config.adm_in_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Sequential(label)

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        skips, channels = [width], width
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._stage(channels, mult * width, level))
                channels = mult * width
                skips.append(channels)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Stage(
            VideoResBlock(channels, channels, emb, config.video_kernel_size, config.norm_groups),
            VideoTransformer(channels, config),
            VideoResBlock(channels, channels, emb, config.video_kernel_size, config.norm_groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                stage = self._stage(channels + skips.pop(), mult * width, level)
                channels = mult * width
                if level > 0 and i == config.num_res_blocks:
                    stage.append(Upsample(channels))
                self.output_blocks.append(stage)

        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, config.out_channels, 3, padding=1),
        )

    def _stage(self, channels: int, out_channels: int, level: int) -> Stage:
        config = self.config
        emb, kernel = 4 * config.model_channels, config.video_kernel_size
        stage = Stage(VideoResBlock(channels, out_channels, emb, kernel, config.norm_groups))
        if 2**level in config.attention_resolutions:
            stage.append(VideoTransformer(out_channels, config))
        return stage

    def forward(
        self,
        x: Tensor,  # [B T, in_channels, h, w], h and w multiples of 2^(levels-1)
        c_noise: Tensor,  # [B T] = ln(sigma)/4
        tokens: ContextTokens,  # from project_context
        vector: Tensor,  # [B T, adm_in_channels]
        T: int,  # pictures in each clip
        blend: Blend | None = None,
        deep: Deep | None = None,
    ) -> Tensor:  # [B T, out_channels, h, w]
        """One evaluation; the same dtype as the weights throughout.

        An empty `deep` is filled; with a full one only the first convolution and the last stage are computed.
        """
        emb = self.time_embed(sinusoid(c_noise, self.config.model_channels).to(x.dtype)) + self.label_emb(vector)
        first = self.input_blocks[0](x, emb, iter(()), T, blend)
        deep = deep or Deep()
        if deep.features is None:
            deep.features = self._below_the_last(first, emb, tokens, T, blend)
        last = torch.cat([deep.features, first], dim=1)
        return self.out(self.output_blocks[-1](last, emb, iter(tokens[-1:]), T, blend))

    def _below_the_last(
        self,
        x: Tensor,  # [B T, model_channels, h, w], what the first convolution makes
        emb: Tensor,  # [B T, 4 model_channels]
        tokens: ContextTokens,
        T: int,
        blend: Blend | None,
    ) -> Tensor:  # [B T, C, h, w]
        remaining = iter(tokens)
        skips = []
        for stage in self.input_blocks[1:]:
            x = stage(x, emb, remaining, T, blend)
            skips.append(x)
        x = self.middle_block(x, emb, remaining, T, blend)
        for stage in self.output_blocks[:-1]:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, remaining, T, blend)
        return x

    def project_context(
        self,
        context: Tensor,  # [B T, context_dim], one token for each picture
        T: int,
    ) -> ContextTokens:
        """Everything the network ever takes from `context`; exact, because there is only one token.

        The temporal blocks see the token of the clip's first picture.  Compute it once per condition and
        keep it: it does not depend on x or sigma.
        """
        token = context[:, None]
        transformers = [module for module in self.modules() if isinstance(module, VideoTransformer)]
        return [transformer.project_context(token, token[::T]) for transformer in transformers]


class Stage(nn.Sequential):
    """The layers between two skip connections; each kind is handed what it needs."""

    def forward(self, x: Tensor, emb: Tensor, tokens, T: int, blend: Blend | None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, VideoResBlock):
                x = layer(x, emb, T)
            elif isinstance(layer, VideoTransformer):
                x = layer(x, next(tokens), T, blend)
            else:
                x = layer(x)
        return x


class VideoTransformer(nn.Module):
    """Attention within each picture and, for each pixel, along the clip."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        args = channels, config.context_dim, config.num_head_channels
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(*args) for _ in range(config.transformer_depth))
        self.proj_out = nn.Linear(channels, channels)
        self.time_stack = nn.ModuleList(TemporalBlock(*args) for _ in range(config.transformer_depth))
        self.time_pos_embed = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, channels)
        )
        self.time_mixer = Mix()

    def forward(
        self,
        x: Tensor,  # [B T, C, h, w]
        tokens: list[tuple[Tensor, Tensor]],  # one pair per block
        T: int,
        blend: Blend | None = None,
    ) -> Tensor:  # [B T, C, h, w]
        height = x.shape[2]
        y = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        frame = self.frame_position(T, y).repeat(x.shape[0] // T, 1)[:, None]
        for spatial, temporal, (token, first) in zip(self.transformer_blocks, self.time_stack, tokens, strict=True):
            y = spatial(y, token, T, blend)
            # The position in the clip reaches the temporal branch only.
            y = self.time_mixer(y, temporal(y + frame, first, T))
        return x + rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=height)

    def frame_position(
        self,
        T: int,
        like: Tensor,  # gives dtype, device and C
    ) -> Tensor:  # [T, C]
        return self.time_pos_embed(sinusoid(torch.arange(T, device=like.device), like.shape[-1]).to(like.dtype))

    def project_context(
        self,
        token: Tensor,  # [B T, 1, D]
        first: Tensor,  # [B, 1, D]
    ) -> list[tuple[Tensor, Tensor]]:
        spatial = [cast(TransformerBlock, block).attn2.to_one_token(token) for block in self.transformer_blocks]
        temporal = [cast(TemporalBlock, block).attn2.to_one_token(first) for block in self.time_stack]
        return list(zip(spatial, temporal, strict=True))


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, h/2, w/2]
        return self.op(x)
