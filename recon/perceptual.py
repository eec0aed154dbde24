"""LPIPS and CLIP's likeness of pictures, from weights that the user brings; none come with d2.

Files are safetensors with the tensor names of the original releases: LPIPS with AlexNet or VGG16 as
`lpips.LPIPS(net=…).state_dict()` gives them (Zhang et al. 2018, version 0.1), CLIP ViT-H/14 as OpenCLIP does.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2 import fileio
from d2.errors import SetupError
from d2.models import clip

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1, before the network
# Layers of each slice by their number in the original network: convolutions (in, out, kernel, stride), ReLU, pooling.
Layer = tuple[int, int, int, int] | str
ALEXNET: list[list[Layer]] = [
    [(3, 64, 11, 4), "relu"],
    ["pool", (64, 192, 5, 1), "relu"],
    ["pool", (192, 384, 3, 1), "relu"],
    [(384, 256, 3, 1), "relu"],
    [(256, 256, 3, 1), "relu"],
]
VGG16: list[list[Layer]] = [
    [(3, 64, 3, 1), "relu", (64, 64, 3, 1), "relu"],
    ["pool", (64, 128, 3, 1), "relu", (128, 128, 3, 1), "relu"],
    ["pool", (128, 256, 3, 1), "relu", (256, 256, 3, 1), "relu", (256, 256, 3, 1), "relu"],
    ["pool", (256, 512, 3, 1), "relu", (512, 512, 3, 1), "relu", (512, 512, 3, 1), "relu"],
    ["pool", (512, 512, 3, 1), "relu", (512, 512, 3, 1), "relu", (512, 512, 3, 1), "relu"],
]
PADDING = {11: 2, 5: 2, 3: 1}  # by kernel
LEFTOVERS = ("scaling_layer.", "lins.")  # constants, and the linear layers under a second name


class LPIPS(nn.Module):
    """Distances of pictures in the features of a network, weighted by how people judge."""

    def __init__(self, slices: list[list[Layer]]) -> None:
        super().__init__()
        self.net = Slices(slices)
        widths = [[layer for layer in part if isinstance(layer, tuple)][-1][1] for part in slices]
        for k, width in enumerate(widths):
            setattr(self, f"lin{k}", Linear(width))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W] in 0..1
        y: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B], 0 for equal pictures
        """Zhang et al. 2018, Eq. 1.  Pictures below about 32 pixels leave the last layers without a pixel."""
        features = [self.net((2 * picture - 1 - self.shift) / self.scale) for picture in (x, y)]
        total = x.new_zeros(len(x))
        for k, (a, b) in enumerate(zip(*features, strict=True)):
            squared = (_unit(a) - _unit(b)).square()
            total = total + getattr(self, f"lin{k}")(squared).mean((1, 2, 3))
        return total


class Slices(nn.Module):
    """A network in parts, under the names `slice1.0.weight`; every part's output is a feature map."""

    def __init__(self, slices: list[list[Layer]]) -> None:
        super().__init__()
        number = 0
        for k, layers in enumerate(slices):
            part = nn.Sequential()
            for layer in layers:
                part.add_module(str(number), _module(layer, pool=3 if slices is ALEXNET else 2))
                number += 1
            self.add_module(f"slice{k + 1}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.children():
            x = part(x)
            found.append(x)
        return found


class Linear(nn.Module):
    """A weight a channel, under the name `model.1.weight`: the original has a dropout before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def load_lpips(path: str | Path) -> LPIPS:
    """AlexNet or VGG16, whichever the file holds. Raises SetupError naming what differs from their layout."""
    tensors = read_weights(path)
    first = tensors.get("net.slice1.0.weight")
    model = LPIPS(ALEXNET if first is not None and first.shape[-1] == 11 else VGG16)
    return fill(model, {k: v for k, v in tensors.items() if not k.startswith(LEFTOVERS)}, path)


def load_clip(path: str | Path, config: clip.ViTConfig | None = None) -> clip.OpenCLIP:
    """OpenCLIP's image half; the file may hold the text half too. Raises SetupError."""
    tensors = {name: tensor for name, tensor in read_weights(path).items() if name.startswith("visual.")}
    return fill(clip.OpenCLIP(config or clip.ViTConfig()), tensors, path)


@torch.no_grad()
def likeness(model: clip.OpenCLIP, x: Tensor, y: Tensor) -> Tensor:  # [B, 3, H, W] in 0..1, both -> [B]
    """CLIP-I: the cosine of the embeddings; resized by antialiased bicubic filters as CLIP was trained.  1 is equal."""
    size = model.visual.config.image_size
    mean, std = (x.new_tensor(values)[:, None, None] for values in (clip.MEAN, clip.STD))
    resized = [F.interpolate(p, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1) for p in (x, y)]
    a, b = (model.visual((picture - mean) / std) for picture in resized)
    return F.cosine_similarity(a, b)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Float32 tensors of a safetensors file. Raises SetupError for anything else."""
    if Path(path).suffix != ".safetensors":
        raise SetupError(f"{fileio.quoted(path)}: weights are read from .safetensors only; a pickle can run code")
    return {name: tensor.float() for name, tensor in fileio.read_tensors(path)[0].items()}


def fill(model: nn.Module, tensors: dict[str, Tensor], path: str | Path):
    """The model with these weights, ready to run. Raises SetupError naming the first tensors that differ."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        shown = "; ".join(
            f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'known')}" for name in wrong[:3]
        )
        raise SetupError(f"{fileio.quoted(path)} is no {type(model).__name__}: {len(wrong)} tensors differ: {shown}")
    model.load_state_dict(tensors, strict=True)
    return model.eval().requires_grad_(False)


def _module(layer: Layer, pool: int) -> nn.Module:
    if isinstance(layer, tuple):
        width, out, kernel, stride = layer
        return nn.Conv2d(width, out, kernel, stride, PADDING[kernel])
    return nn.ReLU() if layer == "relu" else nn.MaxPool2d(pool, 2)


def _unit(x: Tensor) -> Tensor:  # [B, C, H, W], unit length along C
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)
