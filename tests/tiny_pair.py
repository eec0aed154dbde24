"""A pair of tiny, randomly initialised checkpoints in the layout of the official ones, its preset, and input for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d2.config import load
from d2.fileio import write_tensors, write_yaml
from d2.models.weights import layout
from d2.settings import GenerateConfig

PRESET = {
    "view_model": "tiny_view",
    "view_source": "",
    "frame_model": "tiny_frame",
    "frame_source": "",
    "licence": "none: random weights for tests",
    "unet_channels": 32,
    "unet_mult": [1, 1],
    "unet_blocks": 1,
    "unet_attention": [2],
    "unet_head": 16,
    "embedding": 8,
    "clip_size": 32,
    "clip_patch": 8,
    "clip_width": 32,
    "clip_layers": 1,
    "clip_heads": 2,
    "clip_output": 24,
    "vae_channels": 32,
    "vae_mult": [1, 1, 1, 1],
    "vae_blocks": 1,
    "size": 64,
    "views": 3,
    "frames": 3,
    "steps": 3,
    "vrs_steps": 1,
    "sigma_max": 20.0,
    "save_every": 1,
    "preview_every": 2,
}


def write_pair(folder: Path) -> Path:
    """The two files and preset.yaml; returns the preset."""
    settings = load(GenerateConfig, PRESET)
    for seed, model in enumerate(("view", "frame")):
        spec = settings.spec(model)
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: _initial(name, shape, generator) for name, shape in layout(spec).items()}
        write_tensors(folder / spec.filename, tensors)
    write_yaml(folder / "preset.yaml", PRESET)
    return folder / "preset.yaml"


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Matrices by their fan-in, scales of norms near 1: signals keep their size on the way."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / (values[0].numel() ** 0.5)
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Bits depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_ball(path: Path, x: float, y: float, radius: float = 12, size: tuple[int, int] = (60, 100)) -> None:
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    alpha = np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1) * 255
    rgba = np.dstack([np.full_like(alpha, 200), rows * 2.0, columns * 3.0, alpha]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgba).save(path)
