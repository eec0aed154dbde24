"""Pictures with cameras, from wherever they come, and how they are laid down in a run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2.errors import InputError
from d2.matrix import cell_path
from d2.run import TRANSFORMS, Run, frame_time

MATRIX, LOOSE = "generate", "import"  # stages: all views at all moments, or pictures in any arrangement
MOST = 100_000  # pictures


@dataclass(frozen=True)
class Picture:
    """One picture, read when it is written."""

    read: Callable[[], np.ndarray]  # -> [H, W, 3 or 4] uint8, straight alpha
    c2w: np.ndarray  # [4, 4] OpenGL
    K: np.ndarray  # [3, 3] pixels
    size: tuple[int, int]  # width, height
    time: float | None  # 0..1; None in a static scene


@dataclass(frozen=True)
class Matrix:
    """V views at the same F moments; the last view is the input's, where there is one."""

    views: list[list[Picture]]  # [V][F]
    fps: float | None
    record: dict[str, Any] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class Loose:
    """Pictures of any cameras at any time, by split: train, and where there are any val and test."""

    splits: dict[str, list[Picture]]
    fps: float | None = None
    record: dict[str, Any] = field(default_factory=dict)


def write(run: Run, found: Matrix | Loose, progress: Callable[[str, int, int], None]) -> None:
    """Commits what was found to an empty run."""
    stage = MATRIX if isinstance(found, Matrix) else LOOSE
    splits, record = _of_matrix(found) if isinstance(found, Matrix) else _of_splits(found)
    total = sum(len(cells) for cells in splits.values())
    if not 2 <= total <= MOST:
        raise InputError(f"expected 2 to {MOST} pictures, found {total}")
    frames = {name: [_frame(path, picture, more) for path, picture, more in cells] for name, cells in splits.items()}
    done = iter(range(1, total + 1))

    def read(name: str, k: int) -> np.ndarray:
        progress("import", next(done), total)
        return splits[name][k][1].read()

    run.write_pictures(stage, frames, read, record)


Cells = dict[str, list[tuple[str, Picture, dict[str, Any]]]]  # transforms file -> path, picture, more of its frame


def _of_matrix(found: Matrix) -> tuple[Cells, dict[str, Any]]:
    F = len(found.views[0])
    cells = [
        (cell_path(v, f), picture, {"time": frame_time(f, F), "view": v, "frame": f})
        for v, row in enumerate(found.views)
        for f, picture in enumerate(row)
    ]
    return {TRANSFORMS: cells}, found.record | {"views": len(found.views), "frames": F}


def _of_splits(found: Loose) -> tuple[Cells, dict[str, Any]]:
    files = {split: TRANSFORMS if split == "train" else f"transforms_{split}.json" for split in found.splits}
    cells = {
        files[split]: [
            (f"images/{split}/{k:05d}.png", picture, {} if picture.time is None else {"time": picture.time})
            for k, picture in enumerate(pictures)
        ]
        for split, pictures in found.splits.items()
    }
    return cells, found.record


def _frame(path: str, picture: Picture, more: dict[str, Any]) -> dict[str, Any]:
    (width, height), K = picture.size, picture.K
    return {
        "file_path": path, "transform_matrix": picture.c2w.tolist(), **more, "w": width, "h": height,
        "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
    }  # fmt: skip
