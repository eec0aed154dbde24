"""How close a model's surface is to the true one, where true points are known: Chamfer distance and F-score."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2 import fileio
from d2.errors import InputError
from d2.recon.consistency import surface_points
from d2.recon.dataset import Dataset
from d2.recon.formats import ply
from d2.recon.gaussians import Gaussians4D

FOLDER = "points"  # in a dataset: one PLY a moment, evenly spread over 0..1, in the order of their names
MAX_POINTS = 20_000  # of either side that are compared
MAX_MOMENTS = 5  # of those given
MAX_CAMERAS = 48  # whose depth maps make the model's surface
THRESHOLD = 0.01  # of the truth's diagonal: nearer is right
_CHUNK = 2048  # points a time; bounds the memory of the distances


def find_points(dataset: str | Path, points: str | Path | None = None) -> list[Path]:
    """The PLY files of the truth, one a moment: `points`, a file or a folder, else the dataset's `points/`, if any.

    Raises InputError for a `points` that holds none.
    """
    home = Path(dataset)
    place = Path(points) if points is not None else (home.parent if home.is_file() else home) / FOLDER
    if points is None and not place.is_dir():
        return []
    if not place.is_dir():
        if not place.exists():
            raise InputError(f"{fileio.quoted(place)} does not exist; --points takes a PLY file or a folder of them")
        return [place]
    files = sorted(path for path in place.iterdir() if path.suffix == ".ply")
    if not files:
        raise InputError(f"{fileio.quoted(place)} holds no PLY file; expected one for each moment")
    return files


def score(model: Gaussians4D, cells: Dataset, truth: list[Tensor], antialiased: bool = False) -> dict[str, float]:
    """Means over moments of chamfer_percent (of the truth's diagonal) and f_score (at 1 % of it).

    `truth` holds the points [n, 3] of each moment, evenly spread over 0..1.  The model's points are those its depth
    maps show from the cameras of `cells`, so that what no picture can tell (the inside) does not count against it.
    """
    index = spread(len(cells), MAX_CAMERAS)
    rows = []
    for f in spread(len(truth), MAX_MOMENTS):
        time = f / max(1, len(truth) - 1)
        rows.append(compare(surface_points(model, cells, index, time, antialiased), truth[f]))
    return {key: round(statistics.fmean(row[key] for row in rows), 4) for key in rows[0]}


def compare(points: Tensor, truth: Tensor) -> dict[str, float]:  # [n, 3], [m, 3] world
    """Chamfer distance, the mean of both directions, in percent of the truth's diagonal, and the F-score at 1 % of it.

    The F-score is the harmonic mean of two shares: points near the truth, and truth near points (Knapitsch et al.
    2017).  At most 20,000 points of either count, evenly picked.  Without any point it is infinitely far.
    """
    diagonal = float((truth.amax(0) - truth.amin(0)).norm())
    if not len(points):
        return {"chamfer_percent": math.inf, "f_score": 0.0}
    a, b = (x[spread(len(x), MAX_POINTS)].double() for x in (points, truth))
    there, back = nearest(a, b) / diagonal, nearest(b, a) / diagonal
    precision, recall = (float((d < THRESHOLD).double().mean()) for d in (there, back))
    return {
        "chamfer_percent": 50 * float(there.mean() + back.mean()),
        "f_score": 2 * precision * recall / max(precision + recall, 1e-12),
    }


def nearest(a: Tensor, b: Tensor) -> Tensor:  # [n, 3], [m, 3] -> [n]
    """The distance from each point of `a` to the nearest of `b`."""
    return torch.cat([torch.cdist(part, b).amin(1) for part in a.split(_CHUNK)])


def read_points(path: str | Path) -> Tensor:
    """The vertices [n, 3] of a PLY file in our world (z up). Raises InputError that names the file."""
    return torch.from_numpy(ply.read_points(path))


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices of `count`, evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int).tolist()
