"""ImageMatrix: the V views × F frames of a run, read lazily, checked complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2 import fileio, images
from d2.errors import InputError


def cell_path(view: int, frame: int) -> str:
    """Where a cell lies within a run folder (POSIX, relative)."""
    return f"images/v{view:02d}/f{frame:03d}.png"


class ImageMatrix:
    """`m[v, f]` is uint8 RGBA [H, W, 4]; every cell exists and has one size, or opening raises InputError."""

    def __init__(self, folder: str | Path, views: int, frames: int, digests: dict[str, str] | None = None):
        self.folder, self.views, self.frames = Path(folder), views, frames
        self.digests = digests or {}  # path -> sha256 that its file had when it was written
        cells = [(v, f) for v in range(views) for f in range(frames)]
        if not cells:
            raise InputError(f"{fileio.quoted(folder)}: a matrix of {views} views × {frames} frames holds no image")
        missing = [cell for cell in cells if not (self.folder / cell_path(*cell)).is_file()]
        if missing:
            raise InputError(
                f"{fileio.quoted(folder)}: {len(missing)} of {len(cells)} images are missing: {_first_three(missing)}"
            )
        self.width, self.height = images.read_size(self.folder / cell_path(0, 0))
        size = self.width, self.height
        odd = [cell for cell in cells if images.read_size(self.folder / cell_path(*cell)) != size]
        if odd:
            raise InputError(
                f"{fileio.quoted(folder)}: {len(odd)} of {len(cells)} images are not {size[0]}×{size[1]} like the"
                f" first: {_first_three(odd)}"
            )

    def __getitem__(self, cell: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W, 4]; raises InputError naming the file, and with it the cell, when it is damaged or replaced."""
        path = cell_path(*cell)
        if path in self.digests and fileio.sha256(self.folder / path) != self.digests[path]:
            label = fileio.quoted(self.folder / path)
            raise InputError(f"{label}: view {cell[0]} frame {cell[1]} is not the file that was written (sha256)")
        return images.read_rgba(self.folder / path)[0]

    def tensor(self, views: list[int], frames: list[int], background: float = 1.0) -> Tensor:
        """float32 [v, f, 3, H, W] in 0..1, composited on a grey level."""
        cells = np.stack([np.stack([self[v, f] for f in frames]) for v in views]).astype(np.float32) / 255
        rgb = cells[..., :3] * cells[..., 3:] + background * (1 - cells[..., 3:])
        return torch.from_numpy(rgb).movedim(-1, 2).contiguous()


def _first_three(cells: list[tuple[int, int]]) -> str:
    return ", ".join(f"view {v} frame {f}" for v, f in cells[:3])
