"""Fréchet video distance between renders and truth, in four orders of the view × frame matrix.

The network is I3D (Carreira and Zisserman 2017), its weights the user's: the RGB model of Kinetics-400 with 400
classes under the names `Conv3d_1a_7x7.conv3d.weight`, as safetensors.  Features are its logits, averaged over time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2.recon.perceptual import fill, read_weights

SIDE = 224  # pixels of I3D's pictures
LEAST = 9  # pictures of the shortest video whose last feature map has the two moments that I3D averages
STARTS = 8  # videos of the diagonal and the 4D order: as many views, evenly spread, to start from
CLASSES = 400
ORDERS = ("frames", "views", "diagonal", "4d")
_BRANCHES = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)), "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)), "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)), "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)), "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}  # fmt: skip
_POOLS = {  # before the module that is named: kernel and stride
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)), "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}  # fmt: skip


class Unit(nn.Module):
    """Convolution with as much padding as keeps ⌈length / stride⌉, normalisation and ReLU."""

    def __init__(self, width: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(width, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """Inception's four branches."""

    def __init__(self, width: int, outs: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit(width, outs[0], 1)
        self.b1a, self.b1b = Unit(width, outs[1], 1), Unit(outs[1], outs[2], 3)
        self.b2a, self.b2b = Unit(width, outs[3], 1), Unit(outs[3], outs[4], 3)
        self.b3b = Unit(width, outs[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class Logits(nn.Module):
    """The classifier, under the name `conv3d`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """Two-dimensional Inception, inflated along time."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        for name, (width, outs) in _BRANCHES.items():
            self.add_module(name, Mixed(width, outs))
        self.logits = Logits(classes)

    def forward(
        self,
        video: Tensor,  # [B, 3, T, 224, 224] in -1..1, T at least LEAST
    ) -> Tensor:  # [B, classes]
        x = video
        for name, module in self.named_children():
            if name in _POOLS:
                x = _pool(x, *_POOLS[name])
            if name == "logits":
                x = F.avg_pool3d(x, (2, 7, 7), 1)
            x = module(x)
        return x.mean((2, 3, 4))


def load_i3d(path: str | Path) -> I3D:
    """Raises SetupError naming what differs from the layout."""
    tensors = {k: v for k, v in read_weights(path).items() if not k.endswith("num_batches_tracked")}
    model = I3D()
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    return fill(model, tensors | counters, path)


@torch.no_grad()
def fvd(
    model: I3D,
    sample: Tensor,  # [V, F, 3, H, W] in 0..1
    truth: Tensor,  # [V, F, 3, H, W]
) -> dict[str, float]:
    """Fréchet distances by order (SV4D, Xie et al. 2024); an order whose videos have fewer than 9 pictures is left out.

    "frames": the video of each view; "views": the orbit at each moment; "diagonal": view and frame advance together,
    from STARTS views; "4d": the whole matrix row by row, every second row backwards, from STARTS views.  One object
    has few videos, so that the values compare models on one object, not with published ones.
    """
    found = {}
    for order in ORDERS:
        pairs = list(zip(videos(sample, order), videos(truth, order), strict=True))
        if len(pairs[0][0]) >= LEAST:
            a, b = (torch.stack([features(model, pair[side]) for pair in pairs]) for side in (0, 1))
            found[f"fvd_{order}"] = round(frechet(a.double().numpy(), b.double().numpy()), 3)
    return found


def videos(
    matrix: Tensor,  # [V, F, ...]
    order: str,
) -> Iterator[Tensor]:  # [T, ...]
    """The videos of one order."""
    V, F = matrix.shape[:2]
    if order == "frames":
        yield from matrix
    elif order == "views":
        yield from matrix.transpose(0, 1)
    else:
        for start in range(0, V, -(-V // STARTS)):
            turned = matrix.roll(-start, 0)
            if order == "diagonal":
                steps = torch.arange(max(V, F), device=matrix.device)
                yield turned[steps % V, steps % F]
            else:
                yield torch.cat([row if v % 2 == 0 else row.flip(0) for v, row in enumerate(turned)])


def features(model: I3D, video: Tensor) -> Tensor:  # [T, 3, H, W] in 0..1 -> [classes]
    """I3D's logits of one video."""
    return model(2 * resized(video).transpose(0, 1)[None] - 1)[0]


def resized(video: Tensor) -> Tensor:  # [T, 3, H, W] -> [T, 3, 224, 224]
    """At I3D's size, by bilinear interpolation as its authors do; unchanged where it has that size."""
    return F.interpolate(video, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def frechet(a: np.ndarray, b: np.ndarray) -> float:  # [n, D], [m, D]
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), the distance of the Gaussians with these samples' moments.

    With X = (a - μa) / √(n-1) and Y alike, (Σa Σb)^½ has the singular values of X Yᵀ as its trace: no D × D root.
    """
    centred = [x - x.mean(0) for x in (a, b)]
    X, Y = (x / np.sqrt(max(1, len(x) - 1)) for x in centred)
    shared = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + (X * X).sum() + (Y * Y).sum() - 2 * shared)


def _pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around [B, C, T, H, W], the odd one behind, so that ⌈length / stride⌉ places remain."""
    pads = []
    for length, k, s in zip(x.shape[:1:-1], reversed(kernel), reversed(stride), strict=True):
        total = max(k - (s if length % s == 0 else length % s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
