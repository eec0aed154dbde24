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
        missing = [cell for cell in cells if not (self.folder / cell_path(*cell)).is_file()]
        if not cells or missing:
            names = ", ".join(f"view {v} frame {f}" for v, f in missing[:3])
            raise InputError(f"{self.folder}: {len(missing)} of {len(cells)} images are missing: {names}")
        self.height, self.width = self[0, 0].shape[:2]

    def __getitem__(self, cell: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W, 4]; raises InputError naming the cell when its file is damaged or of another size."""
        view, frame = cell
        path = cell_path(view, frame)
        if path in self.digests and fileio.sha256(self.folder / path) != self.digests[path]:
            raise InputError(f"{self.folder}: view {view} frame {frame} is not the file that was written (sha256)")
        rgba, _ = images.read_rgba(self.folder / path)
        expected = (getattr(self, "height", rgba.shape[0]), getattr(self, "width", rgba.shape[1]))
        if rgba.shape[:2] != expected:
            got = f"{rgba.shape[1]}×{rgba.shape[0]}, expected {expected[1]}×{expected[0]}"
            raise InputError(f"{self.folder}: view {view} frame {frame} is {got}")
        return rgba

    def tensor(self, views: list[int], frames: list[int], background: float = 1.0) -> Tensor:
        """float32 [v, f, 3, H, W] in 0..1, composited on a grey level."""
        cells = np.stack([np.stack([self[v, f] for f in frames]) for v in views]).astype(np.float32) / 255
        rgb = cells[..., :3] * cells[..., 3:] + background * (1 - cells[..., 3:])
        return torch.from_numpy(rgb).movedim(-1, 2).contiguous()
