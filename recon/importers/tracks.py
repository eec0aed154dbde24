"""Which Gaussian of one file is which of the next: by order where that holds, else by place and look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from d2.recon.gaussians import Gaussians3D

STEP = 0.1  # of the scene, way from file to file of nine in ten Gaussians, above which the order is not the same
# What makes two Gaussians differ by 1: share of the scene; ln scale; colour; opacity.
OF_SCENE, OF_LOG_SCALE, OF_COLOUR, OF_OPACITY = 0.02, 0.25, 0.05, 0.25
SAME = 3.0  # difference up to which they may be the same
PLACE = slice(0, 3)  # of these features
ROUNDS = 4  # of mutual nearest neighbours, each among what the ones before left
LEAST = 0.9  # share of a file's opacity that has to be found again
SH0 = 0.28209479177387814


class Stack(NamedTuple):
    """The same N Gaussians at F moments, float64."""

    means: Tensor  # [F, N, 3]
    quats: Tensor  # [F, N, 4] wxyz, unit
    log_scales: Tensor  # [F, N, 3]
    opacities: Tensor  # [F, N]
    sh: Tensor  # [F, N, K, 3]

    def part(self, frames: slice, rows: Tensor) -> Stack:
        return Stack(*(tensor[frames][:, rows] for tensor in self))


def aligned(
    moments: Sequence[Gaussians3D],
    extent: float,  # of the scene, world
) -> Stack | None:
    """All moments as one stack; None where too few Gaussians are found again from file to file.

    A Gaussian that is missing in a file has opacity 0 there, and stands between where it was and where it will be.
    """
    if any(moment.sh.shape[1:] != moments[0].sh.shape[1:] for moment in moments):
        return None
    index = _in_order(moments, extent)
    index = _followed(moments, extent) if index is None else index
    return None if index is None else _stacked(moments, index)


def _in_order(moments: Sequence[Gaussians3D], extent: float) -> np.ndarray | None:  # [F, N]
    if len({len(moment) for moment in moments}) > 1:
        return None
    steps = torch.stack([moment.means for moment in moments]).double().diff(dim=0).norm(dim=-1)  # [F-1, N]
    if float(steps.quantile(0.9, dim=1).max()) > STEP * extent:
        return None
    return np.tile(np.arange(len(moments[0])), (len(moments), 1))


def _followed(moments: Sequence[Gaussians3D], extent: float) -> np.ndarray | None:  # [F, N], -1 where it is missing
    """Every file's Gaussians found among all seen before, as they looked when last seen, moved on evenly."""
    known = _features(moments[0], extent)  # [N, D]
    rate, seen = np.zeros((len(known), 3)), np.zeros(len(known))  # of places, a file; the file
    index = [np.arange(len(known))]
    for f, moment in enumerate(moments[1:], 1):
        features, opacities = _features(moment, extent), moment.opacities.double().numpy()
        expected = known.copy()
        expected[:, PLACE] += rate * (f - seen)[:, None]
        here = _pairs(expected, features)  # [N], -1 where it is missing
        again = here >= 0
        found = np.zeros(len(features), bool)
        found[here[again]] = True
        if opacities[found].sum() < LEAST * opacities.sum():
            return None
        way = features[here[again], PLACE] - known[again, PLACE]
        rate[again], seen[again], known[again] = way / (f - seen[again])[:, None], f, features[here[again]]
        new = int((~found).sum())
        known, rate = np.concatenate([known, features[~found]]), np.concatenate([rate, np.zeros((new, 3))])
        seen = np.concatenate([seen, np.full(new, float(f))])
        index.append(np.concatenate([here, np.flatnonzero(~found)]))
    return np.stack([np.pad(row, (0, len(known) - len(row)), constant_values=-1) for row in index])


def _features(moment: Gaussians3D, extent: float) -> np.ndarray:  # [n, 10]
    parts = [
        moment.means / (OF_SCENE * extent), moment.scales.log() / OF_LOG_SCALE, SH0 * moment.sh[:, 0] / OF_COLOUR,
        moment.opacities[:, None] / OF_OPACITY,
    ]  # fmt: skip
    return torch.cat(parts, 1).double().numpy()


def _pairs(known: np.ndarray, features: np.ndarray) -> np.ndarray:  # [N, D], [n, D] -> [N], -1 for none
    """Which of `features` each of `known` is: mutual nearest neighbours that are near enough."""
    pairs = np.full(len(known), -1)
    here = np.arange(len(features))
    for _ in range(ROUNDS):
        there = np.flatnonzero(pairs < 0)
        if not len(there) or not len(here):
            break
        distance, forth = KDTree(features[here]).query(known[there], distance_upper_bound=SAME)
        _, back = KDTree(known[there]).query(features[here], distance_upper_bound=SAME)
        near = np.flatnonzero(np.isfinite(distance))
        mutual = near[back[forth[near]] == near]
        if not len(mutual):
            break
        pairs[there[mutual]] = here[forth[mutual]]
        here = np.delete(here, forth[mutual])
    return pairs


def _stacked(moments: Sequence[Gaussians3D], index: np.ndarray) -> Stack:  # [F, N]
    """Where a Gaussian is missing it looks as it did when last seen, or as it will."""
    F, N = index.shape
    frames = np.arange(F)[:, None]
    before = np.maximum.accumulate(np.where(index >= 0, frames, -1), 0)  # [F, N] when last seen, -1 before the first
    after = np.minimum.accumulate(np.where(index >= 0, frames, F)[::-1], 0)[::-1]  # when next seen, F after the last
    before, after = np.where(before < 0, after, before), np.where(after == F, before, after)
    share = np.divide(frames - before, after - before, where=after > before, out=np.zeros((F, N)))
    start = np.cumsum([0, *(len(moment) for moment in moments)])
    last, following = (torch.from_numpy(start[seen] + index[seen, np.arange(N)]) for seen in (before, after))

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(moment, name) for moment in moments]).double()

    means = whole("means")
    return Stack(
        torch.lerp(means[last], means[following], torch.from_numpy(share)[..., None]),
        whole("quats")[last],
        whole("scales").log()[last],
        whole("opacities")[last].masked_fill(torch.from_numpy(index < 0), 0),
        whole("sh")[last],
    )
