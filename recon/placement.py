"""Where an asset stands in the files that are written: one turn, size and origin for every format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from d2.errors import InputError
from d2.recon import drawing
from d2.recon.formats.frames import move
from d2.recon.gaussians import Gaussians4D

PIVOTS = ("none", "ground", "center")
# Turn about our vertical, in quarter turns, that brings the front from -y to the named direction.
FORWARD = {"-y": 0, "x": 1, "y": 2, "-x": 3}


@dataclass(frozen=True)
class Placement:
    """Raises InputError for a value out of range."""

    height: float | None = None  # metres from the lowest to the highest point over the clip
    pivot: str = "none"  # the origin: where it was, at the feet, or in the middle
    forward: str = "-y"  # where the front looks, in our world (z up)

    def __post_init__(self) -> None:
        if self.height is not None and not 1e-6 <= self.height <= 1e6:
            raise InputError(f"height must be in 1e-6..1e6 metres, got {self.height!r}")
        if self.pivot not in PIVOTS:
            raise InputError(f"pivot must be one of {', '.join(PIVOTS)}, got {self.pivot!r}")
        if self.forward not in FORWARD:
            raise InputError(f"forward must be one of {', '.join(FORWARD)}, got {self.forward!r}")


class Similarity(NamedTuple):
    """p' = scale rotation p + offset."""

    rotation: np.ndarray  # [3, 3]
    scale: float
    offset: np.ndarray  # [3] world

    def poses(self, c2w: np.ndarray) -> np.ndarray:  # [n, 4, 4] both
        """Cameras that see the placed asset as those of `c2w` saw it before."""
        moved = c2w.copy()
        moved[:, :3, :3] = self.rotation @ c2w[:, :3, :3]
        moved[:, :3, 3] = self.scale * c2w[:, :3, 3] @ self.rotation.T + self.offset
        return moved


def place(
    gaussians: Gaussians4D,
    times: Sequence[float] | np.ndarray,  # [F] in 0..1, over which size and ground are measured
    placement: Placement,
) -> tuple[Gaussians4D, Similarity]:
    """The asset as every format writes it, and how it got there; floaters don't count for its size
    (`drawing.bounds`)."""
    if placement == Placement():
        return gaussians, Similarity(np.eye(3), 1.0, np.zeros(3))
    turn = math.pi / 2 * FORWARD[placement.forward]
    c, s = round(math.cos(turn)), round(math.sin(turn))
    R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    turned = move(gaussians, R)
    low, high = drawing.bounds(turned, times)
    scale = 1.0 if placement.height is None else placement.height / max(float(high[2] - low[2]), 1e-9)
    origin = 0.5 * (low + high)
    if placement.pivot == "ground":
        origin[2] = low[2]
    elif placement.pivot == "none":
        origin[:] = 0
    return move(turned, np.eye(3), scale, -scale * origin), Similarity(R, scale, -scale * origin)
