"""Disagreement that can be dialled: a clean multi-view dataset made to disagree with itself, one kind at a time.

    python benchmarks/perturb.py DATASET KIND OUT [--strength 1] [--size 128] [--seed 0]

Every kind is a function (dataset, strength, generator) -> dataset; strength 0 changes nothing but `drop` and `white`
at 0 do nothing either.  What a generated matrix does wrong is in the pictures, what a wrong assumption about the rig
does is in the cameras; either way pictures and cameras no longer belong together.  The command writes a folder that
`d2 reconstruct` reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from d2 import fileio, images
from d2.recon import dataset, hull
from d2.recon.dataset import Dataset

Kind = Callable[[Dataset, float, torch.Generator], Dataset]


def poses(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Every cell shows the object turned by 1.5° (standard deviation about each axis) and moved by 1 % of its box."""
    centre, half = hull.scene_box(data)
    turns = math.radians(1.5) * strength * torch.randn(len(data), 3, generator=generator, dtype=torch.float64)
    moves = 0.01 * half * strength * torch.randn(len(data), 3, generator=generator, dtype=torch.float64)
    return replace(data, viewmats=_moved(data.viewmats, turns, moves, torch.from_numpy(centre)))


def colours(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Every cell has a gain of 1 ± 0.1 and an offset of ± 0.04 in each channel."""
    gain = 1 + 0.1 * strength * torch.randn(len(data), 1, 1, 3, generator=generator)
    offset = 0.04 * strength * torch.randn(len(data), 1, 1, 3, generator=generator)
    rgb, alpha = _layers(data)
    return _with(data, torch.minimum((gain * rgb + offset * alpha).clamp_min(0), alpha), alpha)


def blur(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Every cell is blurred by a Gaussian of 0 to 1.5 pixels at 128."""
    sigmas = 1.5 * strength * torch.rand(len(data), generator=generator) * data.width / 128
    layers = torch.cat(_layers(data), -1).permute(0, 3, 1, 2)
    for k, sigma in enumerate(sigmas.tolist()):
        if sigma < 0.1:
            continue
        reach = math.ceil(3 * sigma)
        taps = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
        taps = (taps / taps.sum()).expand(4, 1, -1)
        once = F.conv2d(layers[k : k + 1], taps[..., None], padding=(reach, 0), groups=4)
        layers[k] = F.conv2d(once, taps[:, :, None], padding=(0, reach), groups=4)[0]
    layers = layers.permute(0, 2, 3, 1)
    return _with(data, layers[..., :3], layers[..., 3:])


def warps(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Every cell is displaced smoothly (a random 4 × 4 grid) by 1.5 pixels at 128 (standard deviation)."""
    grid = 2 * 1.5 / 128 * strength * torch.randn(len(data), 2, 4, 4, generator=generator)
    flow = F.interpolate(grid, (data.height, data.width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = torch.eye(2, 3).expand(len(data), 2, 3)
    places = F.affine_grid(identity, [len(data), 1, data.height, data.width], align_corners=False) + flow
    layers = torch.cat(_layers(data), -1).permute(0, 3, 1, 2)
    layers = F.grid_sample(layers, places, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
    return _with(data, layers[..., :3], layers[..., 3:])


def times(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Every cell shows another moment than it says: off by half a frame (standard deviation)."""
    spacing = 1 / max(1, data.frames - 1)
    jitter = 0.5 * spacing * strength * torch.randn(len(data), generator=generator)
    return replace(data, times=(data.times + jitter).clamp(0, 1))


def mixed(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Poses, colours, blur, warps and times at half strength, together: the nearest to a generated matrix."""
    for kind in (blur, warps, colours, poses, times):
        data = kind(data, 0.5 * strength, generator)
    return data


def drop(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """Four cells in ten are missing."""
    order = torch.randperm(len(data), generator=generator)
    return data.subset(order[round(0.4 * strength * len(data)) :].sort().values)


def white(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """A white background and no alpha."""
    if not strength:
        return data
    rgb, alpha = _layers(data)
    flat = _with(data, rgb + 1 - alpha, torch.ones_like(alpha))
    return replace(flat, has_alpha=False, background=torch.ones(3), plain_background=True)


def mirror(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """The orbit is believed to turn the other way: cameras reflected in azimuth about the first one."""
    return _rig(data, lambda azimuth, elevation: (-azimuth, elevation)) if strength else data


def fov(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """The field of view is believed to be a tenth narrower than it is."""
    narrower = torch.atan(data.width / 2 / data.Ks[:, 0, 0]) * (1 - 0.1 * strength)
    Ks = data.Ks.clone()
    scale = data.width / 2 / torch.tan(narrower) / Ks[:, 0, 0]
    Ks[:, 0, 0] *= scale
    Ks[:, 1, 1] *= scale
    return replace(data, Ks=Ks)


def elevation(data: Dataset, strength: float, generator: torch.Generator) -> Dataset:
    """All cameras are believed to be 5° higher than they are."""
    return _rig(data, lambda azimuth, elevation: (azimuth, elevation + math.radians(5) * strength))


KINDS: dict[str, Kind] = {
    "poses": poses, "colours": colours, "blur": blur, "warps": warps, "times": times, "mixed": mixed,
    "drop": drop, "white": white, "mirror": mirror, "fov": fov, "elevation": elevation,
}  # fmt: skip


def perturb(data: Dataset, kind: str, strength: float = 1.0, seed: int = 0) -> Dataset:
    """The dataset with one kind of disagreement; the same seed gives the same."""
    return KINDS[kind](data, strength, torch.Generator().manual_seed(seed))


def _layers(data: Dataset) -> tuple[Tensor, Tensor]:
    """Premultiplied colour [n, H, W, 3] and alpha [n, H, W, 1] in 0..1."""
    layers = data.images.float() / 255
    return layers[..., :3], layers[..., 3:]


def _with(data: Dataset, rgb: Tensor, alpha: Tensor) -> Dataset:
    layers = torch.cat([rgb, alpha], -1)
    return replace(data, images=(layers.clamp(0, 1) * 255).round().to(torch.uint8))


def _moved(viewmats: Tensor, turns: Tensor, moves: Tensor, centre: Tensor) -> Tensor:
    """World to camera of cameras that are turned by rotation vectors about a centre and moved, each on its own."""
    x, y, z = turns.unbind(-1)
    zero = torch.zeros_like(x)
    R = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3))
    motion = torch.eye(4, dtype=torch.float64).repeat(len(R), 1, 1)
    motion[:, :3, :3] = R
    motion[:, :3, 3] = centre + moves - (R @ centre[:, None])[..., 0]
    return (viewmats.double() @ motion).float()


def _rig(data: Dataset, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Dataset:
    """Cameras put elsewhere on their spheres about the scene's centre (z up, azimuth from the first camera's)."""
    centre = torch.from_numpy(hull.scene_box(data)[0])
    offset = data.camera_centres().double() - centre
    radius = offset.norm(dim=-1)
    azimuth, height = torch.atan2(offset[:, 1], offset[:, 0]), torch.asin(offset[:, 2] / radius)
    new_azimuth, new_height = change(azimuth - azimuth[0], height)
    turn = new_azimuth + azimuth[0] - azimuth
    rise = (new_height - height)[:, None] * torch.stack([azimuth.sin(), -azimuth.cos(), torch.zeros_like(azimuth)], -1)
    about_z = torch.stack([torch.zeros_like(turn), torch.zeros_like(turn), turn], -1)
    still = torch.zeros(len(data), 3, dtype=torch.float64)
    # a camera that turns with R sees the world as one that stays while the world turns with R⁻¹
    viewmats = _moved(_moved(data.viewmats, -rise, still, centre), -about_z, still, centre)
    return replace(data, viewmats=viewmats)


def main(source: Path, kind: str, out: Path, strength: float = 1.0, size: int = 128, seed: int = 0) -> None:
    data = perturb(dataset.load(source, size=size), kind, strength, seed)
    frames = []
    for k in range(len(data)):
        name = f"images/{k:05d}.png"
        images.write_png(out / name, _straight(data.images[k]))
        K, pose = data.Ks[k], torch.linalg.inv(data.viewmats[k].double())
        frames.append({
            "file_path": name, "time": float(data.times[k]), "w": data.width, "h": data.height,
            "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
            "transform_matrix": (pose @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))).tolist(),
        })  # fmt: skip
    fileio.write_json(out / "transforms.json", {"camera_model": "OPENCV", "frames": frames})


def _straight(premultiplied: Tensor):
    layers = premultiplied.float()
    layers[..., :3] = (layers[..., :3] / (layers[..., 3:] / 255).clamp_min(1e-6)).clamp_max(255)
    return layers.round().to(torch.uint8).numpy()


if __name__ == "__main__":
    typer.run(main)
