"""A sequence of 3DGS PLY files as 4D Gaussians, where the same Gaussians are found in all; else pictures to fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from d2 import camera, fileio, images, inputs
from d2.errors import InputError, ResourceError
from d2.recon import drawing
from d2.recon.formats import ply, sequence
from d2.recon.gaussians import OPACITY_LOGIT_LIMIT, STILL_LOG_DURATION, Gaussians3D, Gaussians4D
from d2.recon.importers.pictures import Matrix, Picture
from d2.recon.importers.tracks import SH0, Stack, aligned

MEMORY = 8 << 30  # bytes of a whole sequence
VISIBLE = 0.05  # opacity from which on a misfit counts
# Misfits that are as good as none: standard deviations and share of the scene; opacity; rad; ln; colour.
OF_SCALE, OF_SCENE, OF_OPACITY, OF_ANGLE, OF_LOG_SCALE, OF_COLOUR = 0.25, 0.002, 0.1, 0.2, 0.25, 0.05
WINDOW = 0.6  # standard deviation of a piece's window, of its length
OVERLAP = 1.47  # sum of the windows of all pieces at any time, within 3 %
LEAST = 0.005  # opacity of a piece that is left out
DRAWN_VIEWS, DRAWN_SIZE, DRAWN_FOV = 24, 400, 40.0  # cameras that look at what does not match; pixels; degrees
ELEVATIONS = (-15.0, 15.0, 45.0)  # degrees, in turn


class Sequence4D(NamedTuple):
    """The files of a sequence, read."""

    moments: list[Gaussians3D]
    times: np.ndarray  # [F] in 0..1
    fps: float | None


def read(folder: Path, progress: Callable[[str, int, int], None]) -> Sequence4D:
    """Every PLY of a folder in the order of its numbers; times and rate from a frames.json beside them, if any.

    Raises InputError for fewer than two and for files that hold no 3D Gaussians, ResourceError for too many.
    """
    files = inputs.natural_order([path for path in folder.iterdir() if path.suffix.lower() == ".ply"], folder)
    if len(files) < 2:
        raise InputError(f"{fileio.quoted(folder)}: expected a sequence of two PLY files or more, got {len(files)}")
    total = sum(path.stat().st_size for path in files)
    if total > MEMORY:
        raise ResourceError(f"{fileio.quoted(folder)} holds {total >> 20} MB of PLY files, more than {MEMORY >> 20}")
    times, fps = _timing(folder, files)
    moments = []
    for k, path in enumerate(files):
        moments.append(ply.read(path))
        progress("read", k + 1, len(files))
    return Sequence4D(moments, times, fps)


def matched(given: Sequence4D) -> Gaussians4D | None:
    """The sequence in velocity form; None where Gaussians are not found again from file to file (see tracks).

    A Gaussian that moves evenly, and comes and goes as exp(-(t - μ)²/2c), stays one, exactly.  Another one becomes as
    many pieces as it takes, halving the clip again and again, each with an even motion and a window in time; the
    pieces' optical depth adds up to the Gaussian's.
    """
    extent = _extent(given.moments)
    stack = aligned(given.moments, extent)
    if stack is None:
        return None
    t = torch.from_numpy(given.times).double()
    pieces, rows, count = [], torch.arange(stack.means.shape[1]), 1
    while len(rows):
        found, misfit = _fit(stack, t, rows, count, extent)
        last = count >= len(t) - 1
        good = torch.ones_like(misfit, dtype=torch.bool) if last else misfit <= 1
        pieces += [piece.map(lambda x, good=good: x[good]) for piece in found]
        rows, count = rows[~good], min(2 * count, len(t) - 1)
    whole = Gaussians4D(**{k: torch.cat([p.tensors()[k] for p in pieces]).float() for k in pieces[0].tensors()})
    seen = whole.opacity_logits.sigmoid() >= LEAST
    seen |= whole.log_durations >= STILL_LOG_DURATION  # a whole Gaussian stays, however faint
    return whole.map(lambda x: x[seen])


def drawn(given: Sequence4D) -> Matrix:
    """The sequence as orbit cameras see it, for d2 reconstruct to fit: what is left where nothing matches."""
    points = [m.means[m.opacities >= 0.1].double().numpy() for m in given.moments]
    every = np.concatenate(points)
    if len(every) == 0:
        raise InputError("nothing of the sequence is opaque")
    low, high = np.quantile(every, [0.001, 0.999], axis=0)
    centre, reach = (low + high) / 2, max(float(np.linalg.norm(high - low)) / 2, 1e-6)
    azimuth = 2 * np.pi * (np.arange(DRAWN_VIEWS) + 1) / DRAWN_VIEWS
    elevation = np.radians(np.resize(ELEVATIONS, DRAWN_VIEWS))
    distance = 1.1 * reach / math.sin(math.radians(DRAWN_FOV) / 2)
    c2w = camera.look_at_origin(camera.orbit_positions(azimuth, elevation, distance) + centre, centre)
    focal = camera.focal_length(math.radians(DRAWN_FOV), DRAWN_SIZE)
    K, size = camera.intrinsics(focal, focal, DRAWN_SIZE / 2, DRAWN_SIZE / 2), (DRAWN_SIZE, DRAWN_SIZE)
    rows = [[Picture(partial(_draw, m, pose, K), pose, K, size, None) for m in given.moments] for pose in c2w]
    return Matrix(rows, given.fps)


def _draw(moment: Gaussians3D, c2w: np.ndarray, K: np.ndarray) -> np.ndarray:
    (picture,) = drawing.render_views(moment, c2w[None], K, DRAWN_SIZE, DRAWN_SIZE, [0.0])
    return images.to_uint8(picture)


def _timing(folder: Path, files: list[Path]) -> tuple[np.ndarray, float | None]:
    even = np.linspace(0, 1, len(files))
    if not (folder / sequence.MANIFEST).is_file():
        return even, None
    label = fileio.quoted(folder / sequence.MANIFEST)
    meta: Any = fileio.read_json(folder / sequence.MANIFEST)
    try:
        times = {str(entry["file"]): float(entry["time"]) for entry in meta["frames"]}
        found, fps = np.array([times[path.name] for path in files]), float(meta["fps"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{label} does not name a time for each PLY file: {error}") from error
    if not (np.diff(found) > 0).all() or found[0] < 0 or found[-1] > 1 or not 0 < fps <= 1000:
        raise InputError(f"{label}: times must rise within 0..1 and fps be in 0..1000")
    return found, fps


def _extent(moments: Sequence[Gaussians3D]) -> float:
    """Diagonal of what most Gaussians of the first moment fill."""
    means = moments[0].means.double().numpy()
    low, high = np.quantile(means, [0.01, 0.99], axis=0)
    return max(float(np.linalg.norm(high - low)), 1e-9)


def _fit(stack: Stack, t: Tensor, rows: Tensor, count: int, extent: float) -> tuple[list[Gaussians4D], Tensor]:
    """`count` pieces of the clip for each of `rows`, and the largest misfit [n] of any, 1 being as good as none."""
    F = len(t)
    if count == 1:
        part = stack.part(slice(0, F), rows)
        piece, opacities = _whole(part, t)
        return [piece], _misfit(part, t, piece, opacities, extent)
    bounds = [round(k * (F - 1) / count) for k in range(count + 1)]
    pieces, misfit = [], torch.zeros(len(rows), dtype=torch.float64)
    for k, (a, b) in enumerate(itertools.pairwise(bounds)):
        part, when = stack.part(slice(a, b + 1), rows), t[a : b + 1]
        opacity = part.opacities.mean(0)
        length = float(when[-1] - when[0])
        thinned = 1 - (1 - opacity).clamp_min(1e-7) ** (1 / OVERLAP)
        middle = torch.full_like(opacity, float(when[0] + when[-1]) / 2)
        piece = _piece(part, when, middle, torch.full_like(opacity, math.log(WINDOW * length)), thinned)
        misfit = torch.maximum(misfit, _misfit(part, when, piece, opacity.expand_as(part.opacities), extent))
        # Beyond both ends of the clip the windows go on, so that they add up to the same there.
        shifts = [0.0] + [-length] * (k == 0) + [length] * (k == count - 1)
        for shift in shifts:
            moved = {"times": piece.times + shift, "means": piece.means + shift * piece.velocities}
            pieces.append(Gaussians4D(**(piece.tensors() | moved)))
    return pieces, misfit


def _whole(part: Stack, t: Tensor) -> tuple[Gaussians4D, Tensor]:
    """One Gaussian for the whole clip, and its opacity [F, n]: ln o is a parabola in time, or constant."""
    o = part.opacities.clamp_min(1e-12)
    weights = (o / o.amax(0)).square()
    basis = torch.stack([torch.ones_like(t), t, t * t], -1)  # [F, 3]
    normal = torch.einsum("fi, fn, fj -> nij", basis, weights, basis)
    normal = normal + 1e-12 * torch.eye(3, dtype=torch.float64)
    target = torch.einsum("fi, fn, fn -> ni", basis, weights, o.log())
    c0, c1, c2 = torch.linalg.solve(normal, target).unbind(-1)
    still = (part.opacities.amax(0) - part.opacities.amin(0) < 0.01) | (c2 > -1e-6)
    bend = torch.where(still, -torch.ones_like(c2), c2)
    centre = torch.where(still, t.mean(), -c1 / (2 * bend))
    log_duration = torch.where(still, STILL_LOG_DURATION, -0.5 * (-2 * bend).log())
    peak = torch.where(still, part.opacities.mean(0), (c0 - c1**2 / (4 * bend)).clamp(max=0).exp())
    fitted = peak * (-0.5 * ((t[:, None] - centre) / log_duration.exp()) ** 2).exp()
    return _piece(part, t, centre, log_duration, peak), fitted


def _piece(part: Stack, t: Tensor, centre: Tensor, log_duration: Tensor, opacity: Tensor) -> Gaussians4D:
    """Even motion by least squares, everything else averaged, weighted with opacity; all [n, …]."""
    weights = part.opacities.clamp_min(1e-3)
    weights = weights / weights.sum(0)
    mean_time = torch.einsum("fn, f -> n", weights, t)
    mean = torch.einsum("fn, fni -> ni", weights, part.means)
    offset = t[:, None] - mean_time  # [F, n]
    spread = (weights * offset**2).sum(0).clamp_min(1e-12)
    velocity = torch.einsum("fn, fni -> ni", weights * offset, part.means - mean) / spread[:, None]
    return Gaussians4D(
        means=mean + velocity * (centre - mean_time)[:, None],
        velocities=velocity,
        times=centre,
        log_durations=log_duration,
        quats=_mean_rotation(part.quats, weights),
        log_scales=torch.einsum("fn, fni -> ni", weights, part.log_scales),
        opacity_logits=torch.logit(opacity.clamp(1e-7, 1 - 1e-7)).clamp(-OPACITY_LOGIT_LIMIT, OPACITY_LOGIT_LIMIT),
        sh=torch.einsum("fn, fnkc -> nkc", weights, part.sh),
    )


def _mean_rotation(quats: Tensor, weights: Tensor) -> Tensor:  # [F, n, 4], [F, n] -> [n, 4]
    """q and -q are one rotation: all are turned towards the most visible one first."""
    best = weights.argmax(0)
    chosen = quats.gather(0, best[None, :, None].expand(1, -1, 4))
    aligned = torch.where((quats * chosen).sum(-1, keepdim=True) < 0, -quats, quats)
    return torch.nn.functional.normalize((weights[..., None] * aligned).sum(0), dim=-1)


def _misfit(part: Stack, t: Tensor, piece: Gaussians4D, opacities: Tensor, extent: float) -> Tensor:  # [n]
    means = piece.means + piece.velocities * (t[:, None, None] - piece.times[:, None])
    largest = part.log_scales.amax(-1)
    round_ = largest - part.log_scales.amin(-1) < 0.2  # turning a ball changes nothing
    cosine = (part.quats * piece.quats).sum(-1).abs().clamp(max=1)
    angle = torch.where(round_, 0, 2 * cosine.acos())
    kinds = [
        (part.means - means).norm(dim=-1) / (OF_SCALE * largest.exp() + OF_SCENE * extent),
        angle / OF_ANGLE,
        (part.log_scales - piece.log_scales).abs().amax(-1) / OF_LOG_SCALE,
        SH0 * (part.sh[:, :, 0] - piece.sh[:, 0]).abs().amax(-1) / OF_COLOUR,
    ]
    visible = torch.where(part.opacities >= VISIBLE, torch.stack(kinds).amax(0), 0)
    return cast(Tensor, torch.maximum(visible, (part.opacities - opacities).abs() / OF_OPACITY)).amax(0)
