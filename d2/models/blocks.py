"""Layers that the networks share: sinusoids, residual blocks, attention, the mix of space and time.

T consecutive pictures of one clip lie next to each other in the batch: index = clip·T + t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm of the official networks
MAX_PERIOD = 10000.0  # of the slowest sinusoid


def sinusoid(
    values: Tensor,  # [N] any unit
    dim: int,
) -> Tensor:  # [N, dim] float32
    """cos and sin of `values` at dim/2 geometric frequencies, cosines first (odd `dim`: a zero follows)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class Mix(nn.Module):
    """a·spatial + (1-a)·temporal with one learned a = sigmoid(mix_factor)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(
        self,
        spatial: Tensor,  # any shape
        temporal: Tensor,  # like spatial
    ) -> Tensor:  # like spatial
        return torch.lerp(temporal, spatial, torch.sigmoid(self.mix_factor))


class TimeConv(nn.Conv3d):
    """A 3D convolution; one that looks along time only runs as a 2D one over (t, h·w), which CPUs do faster."""

    def forward(
        self,
        input: Tensor,  # [B, C, T, h, w]
    ) -> Tensor:  # [B, C', T, h, w], with the padding that keeps the size
        if self.kernel_size[1:] != (1, 1):
            return super().forward(input)
        h = input.shape[3]
        kernel, padding = self.weight[..., 0], (self.padding[0], 0)  # type: ignore[index]
        flat = rearrange(input, "b c t h w -> b c t (h w)")
        return rearrange(F.conv2d(flat, kernel, self.bias, padding=padding), "b c t (h w) -> b c t h w", h=h)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a skip; over (h, w) or, with a 3D kernel, (t, h, w)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int | None,
        kernel: tuple[int, ...],
        groups: int = GROUPS,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d if len(kernel) == 2 else TimeConv
        padding = tuple(k // 2 for k in kernel)
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            conv(channels, out_channels, kernel, padding=padding),  # type: ignore[arg-type]
        )
        if emb_channels is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # where the checkpoint's numbering counts a dropout
            conv(out_channels, out_channels, kernel, padding=padding),  # type: ignore[arg-type]
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else conv(channels, out_channels, 1)

    def forward(
        self,
        x: Tensor,  # [B T, C, h, w] or [B, C, T, h, w]
        emb: Tensor | None = None,  # [B T, E] or [B, T, E]
    ) -> Tensor:  # like x, with out_channels
        h = self.in_layers(x)
        if emb is not None:
            shift = self.emb_layers(emb)
            h = h + (shift[:, :, None, None] if x.ndim == 4 else rearrange(shift, "b t c -> b c t 1 1"))
        return self.skip_connection(x) + self.out_layers(h)


class VideoResBlock(ResBlock):
    """A spatial ResBlock followed by a temporal one, mixed."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        kernel: tuple[int, int, int],
        groups: int = GROUPS,
    ) -> None:
        super().__init__(channels, out_channels, emb_channels, (3, 3), groups)
        self.time_stack = ResBlock(out_channels, out_channels, emb_channels, kernel, groups)
        self.time_mixer = Mix()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B T, C, h, w]
        emb: Tensor,  # [B T, E]
        T: int,
    ) -> Tensor:  # [B T, out_channels, h, w]
        x = super().forward(x, emb)
        clips = rearrange(x, "(b t) c h w -> b c t h w", t=T)
        moved = self.time_stack(clips, rearrange(emb, "(b t) c -> b t c", t=T))
        return rearrange(self.time_mixer(clips, moved), "b c t h w -> (b t) c h w")


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, without biases but for the output's."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(
        self,
        x: Tensor,  # [B, N, C] queries
        context: Tensor,  # [B, M, D] keys and values
    ) -> Tensor:  # [B, N, C]
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", d=self.head_dim) for y in (q, k, v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    def to_one_token(
        self,
        token: Tensor,  # [..., D]
    ) -> Tensor:  # [..., C]
        """What every query receives when the context is a single token: softmax over one key is 1."""
        return self.to_out(self.to_v(token))


class FeedForward(nn.Module):
    """Linear, GEGLU (with the exact GELU), Linear, four times as wide inside."""

    chunk = 0  # rows of x that are taken at a time, 0 all: what is wide inside is the largest tensor of a network

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(
        self,
        x: Tensor,  # [..., dim]
    ) -> Tensor:  # like x
        rows = x.flatten(0, -2)
        if not 0 < self.chunk < len(rows):
            return self.net(x)
        out = torch.empty_like(rows)
        for part, target in zip(rows.split(self.chunk), out.split(self.chunk), strict=True):
            target.copy_(self.net(part))
        return out.view(x.shape)


class GEGLU(nn.Module):
    """x·GELU(gate), both from one projection."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(
        self,
        x: Tensor,  # [..., dim]
    ) -> Tensor:  # [..., inner]
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


@dataclass(frozen=True)
class Blend:
    """Smooths keys and values of spatial self-attention over neighbouring frames (columns of the matrix).

    The batch is independent stacks of columns (two with classifier-free guidance): as many as `sets` says, or
    as there are of `columns`.  `reference` pads with zeros, so that the end frames lose (1-weight)/2 of their
    size; `replicate` repeats them.
    """

    weight: float = 0.6  # of the frame itself; each neighbour has (1-weight)/2
    sets: int = 2
    padding: Literal["replicate", "reference"] = "replicate"
    columns: int | None = None  # in each set

    def __call__(
        self,
        x: Tensor,  # [sets columns T, ...]
        T: int,
    ) -> Tensor:  # like x
        columns = self.columns or len(x) // (self.sets * T)
        x = rearrange(x, "(u b t) ... -> u b t ...", b=columns, t=T)
        first, last = x[:, :1], x[:, -1:]
        if self.padding == "reference":
            first, last = torch.zeros_like(first), torch.zeros_like(last)
        around = torch.cat([first, x[:, :-1]], dim=1) + torch.cat([x[:, 1:], last], dim=1)
        return rearrange(self.weight * x + (1 - self.weight) / 2 * around, "u b t ... -> (u b t) ...")


class TransformerBlock(nn.Module):
    """Spatial self-attention, one token of context, feed-forward.

    attn2.to_q, attn2.to_k and norm2 are in every checkpoint and have no effect: with one context token
    the attention weights are 1.  They are kept so that loading stays strict.
    """

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, dim, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, context_dim, head_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B T, h w, C]
        token: Tensor,  # [B T, 1, C] = attn2.to_one_token(context)
        T: int,
        blend: Blend | None = None,
    ) -> Tensor:  # [B T, h w, C]
        normed = self.norm1(x)
        x = x + self.attn1(normed, blend(normed, T) if blend else normed)
        x = x + token
        return x + self.ff(self.norm3(x))


class TemporalBlock(TransformerBlock):
    """The same along time: each pixel attends to itself in the T pictures of its clip."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__(dim, context_dim, head_dim)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)

    def forward(
        self,
        x: Tensor,  # [B T, h w, C]
        token: Tensor,  # [B, 1, C], from the first picture of each clip
        T: int,
        blend: Blend | None = None,
    ) -> Tensor:  # [B T, h w, C]
        pixels = x.shape[1]
        x = rearrange(x, "(b t) s c -> (b s) t c", t=T)
        x = x + self.ff_in(self.norm_in(x))
        x = super().forward(x, token.repeat_interleave(pixels, dim=0), T)
        return rearrange(x, "(b s) t c -> (b t) s c", s=pixels)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, 2h, 2w]
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
