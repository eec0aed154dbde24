"""A 3D asset for stage 1: meshes are drawn by d2.asset, 3D Gaussians by our rasterizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from d2.asset import Asset, Mesh
from d2.recon import drawing
from d2.recon.formats import ply

HEADER = 1 << 16  # bytes of a PLY that are searched for the properties of Gaussians
OPAQUE = 0.1  # opacity of a Gaussian that counts for how far a splat reaches
TAIL = 0.001  # share of the opaque Gaussians on either side that do not count: floaters


class Splat:
    """A static set of 3D Gaussians as an asset."""

    up: Literal["y", "z"] = "z"  # the reader has brought it into our axes

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gaussians = ply.read(path)

    @property
    def points(self) -> np.ndarray:
        means = self._gaussians.means[self._gaussians.opacities >= OPAQUE].double().numpy()
        if len(means) == 0:
            return means
        return means.clip(*np.quantile(means, [TAIL, 1 - TAIL], axis=0))

    def draw(self, c2w: np.ndarray, K: np.ndarray, size: int, turn: np.ndarray) -> np.ndarray:
        (picture,) = drawing.render_views(self._gaussians, c2w[None], K, size, size, [0.0])
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def open_asset(path: Path) -> Asset:
    """The file as something to draw. Raises InputError for what is neither a mesh nor a 3D Gaussian PLY."""
    if path.suffix.lower() == ".ply" and path.is_file():
        with path.open("rb") as file:
            if b"f_dc_0" in file.read(HEADER).partition(b"end_header")[0]:
                return Splat(path)
    return Mesh(path)
