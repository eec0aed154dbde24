"""Where to start: Gaussians on the visual hull of the masks at every moment, or at random where there is no alpha."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from d2.errors import InputError
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import sh

GRID = 72  # voxels along a side of the box
COARSE_GRID = 40
MIN_DISTANCE = 0.1  # world, of the cameras from the object: the rasterizer's near plane is at 0.01
MIN_VIEWS = 4  # of a moment, for its hull to mean anything
ALPHA_INSIDE = 64  # of 255: a voxel belongs to the mask from here
BACKGROUND_DIFFERENCE = 8  # of 255: more than noise or compression does to a plain background
START_OPACITY = 0.3
SCALE_OF_SPACING = 0.5  # a Gaussian's start size, in distances to its neighbours


def scene_box(dataset: Dataset) -> tuple[np.ndarray, float]:
    """Centre [3] and half side of a cube that holds what all cameras look at.

    The centre is the point nearest to all optical axes (least squares); the half side is what the
    narrowest camera sees at that distance.  Raises InputError for cameras so close that the near plane cuts
    into the object.
    """
    w2c = dataset.viewmats.double()
    centres = dataset.camera_centres().double()
    axes = w2c[:, 2, :3]
    project = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    A, b = project.sum(0), (project @ centres[:, :, None]).sum(0)[:, 0]
    ridge = 1e-6 * len(dataset)  # parallel axes have no nearest point: stay near the cameras' mean
    centre = torch.linalg.solve(A + ridge * torch.eye(3, dtype=torch.float64), b + ridge * centres.mean(0))
    depth = ((centre - centres) * axes).sum(-1).abs()
    if depth.median() < MIN_DISTANCE:
        raise InputError(
            f"the cameras are {float(depth.median()):.3g} units from what they look at, and nothing nearer than 0.01"
            f" is drawn: multiply the positions of all transform_matrix so that they are at least {MIN_DISTANCE}"
        )
    K = dataset.Ks.double()
    half_view = torch.minimum(dataset.width / 2 / K[:, 0, 0], dataset.height / 2 / K[:, 1, 1])
    return centre.numpy(), float((depth * half_view).median().clamp_min(1e-6))


def initialise(dataset: Dataset, count: int, duration: float, sh_degree: int, seed: int) -> Gaussians4D:
    """`count` Gaussians: on the hull of each moment, coloured by the cameras that face them, at rest."""
    rng = np.random.default_rng(seed)
    centre, half = scene_box(dataset)
    moments = _moments(dataset)
    hulls = _hulls(dataset, moments, centre, half) if dataset.has_alpha or dataset.plain_background else []
    if hulls:
        points, normals, spacing, bins = _on_surfaces(hulls, count, rng)
        colors = _facing_colours(dataset, moments, points, normals, bins)
        share = min(1.0, math.sqrt(2 * math.pi) * duration)  # of all, those visible at one moment
        spacing *= math.sqrt(1 / max(share * count, 1))
    else:
        points = centre + half * rng.uniform(-0.8, 0.8, (count, 3))
        colors = np.full((count, 3), 0.5)
        bins = rng.integers(0, len(moments), count)
        spacing = 1.6 * half / count ** (1 / 3)
    moment_times = np.array([float(dataset.times[m].mean()) for m in moments])
    coefficients = torch.zeros(count, sh.bases(sh_degree), 3)
    coefficients[:, 0] = sh.rgb_to_sh0(torch.from_numpy(colors).float())
    return Gaussians4D(
        means=torch.from_numpy(points).float(),
        velocities=torch.zeros(count, 3),
        times=torch.from_numpy(moment_times[bins]).float(),
        log_durations=torch.full((count,), math.log(duration)),
        quats=torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, 4))).float(), dim=-1),
        log_scales=torch.full((count, 3), math.log(SCALE_OF_SPACING * spacing)),
        opacity_logits=torch.full((count,), math.log(START_OPACITY / (1 - START_OPACITY))),
        sh=coefficients,
    )


def _moments(dataset: Dataset) -> list[Tensor]:
    """Cells grouped by time, neighbours merged until each group has MIN_VIEWS different views."""
    groups, pending = [], []
    for time in dataset.times.unique():
        pending.append((dataset.times == time).nonzero()[:, 0])
        cells = torch.cat(pending)
        if len(dataset.views[cells].unique()) >= MIN_VIEWS:
            groups.append(cells)
            pending = []
    if pending:  # what is left joins the last group
        last = [groups.pop()] if groups else []
        groups.append(torch.cat(last + pending))
    return groups


def _hulls(dataset: Dataset, moments: list[Tensor], centre: np.ndarray, half: float):
    """Occupancy of each moment on one grid fitted to the union of all. Empty when the masks carve all away."""
    masks = _masks(dataset)
    P = (dataset.Ks.double() @ dataset.viewmats[:, :3].double()).numpy()

    def carve(low, high, grid):
        step = (high - low) / grid
        axes = [low[k] + (np.arange(grid) + 0.5) * step[k] for k in range(3)]
        occupied = [_carve(*axes, masks, P, cells.numpy(), _tolerance(dataset, cells)) for cells in moments]
        return occupied, axes, step

    low, high = centre - half, centre + half
    occupied, axes, step = carve(low, high, COARSE_GRID)
    union = np.logical_or.reduce(occupied)
    if not union.any():
        return []
    where = np.nonzero(union)
    low = np.array([axes[k][where[k].min()] for k in range(3)]) - 1.5 * step
    high = np.array([axes[k][where[k].max()] for k in range(3)]) + 1.5 * step
    occupied, axes, step = carve(low, high, GRID)
    surfaces = [_surface(o, axes, step) for o in occupied]
    return surfaces if all(len(points) for points, _, _ in surfaces) else []


def _masks(dataset: Dataset) -> np.ndarray:
    """uint8 [n, H, W]: alpha, or what differs from a plain background."""
    if dataset.has_alpha:
        return np.ascontiguousarray(dataset.images[..., 3].numpy())
    colour = (dataset.background * 255).to(torch.int16)
    difference = (dataset.images[..., :3].to(torch.int16) - colour).abs().amax(-1)
    return np.ascontiguousarray(((difference > BACKGROUND_DIFFERENCE) * 255).to(torch.uint8).numpy())


def _tolerance(dataset: Dataset, cells: Tensor) -> float:
    """Share of masks that may disagree: none within one moment, some over merged moments or where masks are guesses."""
    return 0.0 if dataset.has_alpha and len(dataset.times[cells].unique()) == 1 else 0.1


@njit(parallel=True, cache=True)
def _carve(xs, ys, zs, masks, P, cells, tolerance):
    """bool [X, Y, Z]: seen by a quarter of `cells` and inside all their masks but a share of `tolerance`."""
    _, height, width = masks.shape
    occupied = np.zeros((xs.shape[0], ys.shape[0], zs.shape[0]), np.bool_)
    for a in prange(xs.shape[0]):
        for b in range(ys.shape[0]):
            for c in range(zs.shape[0]):
                x, y, z = xs[a], ys[b], zs[c]
                misses, seen = 0, 0
                for n in cells:
                    w = P[n, 2, 0] * x + P[n, 2, 1] * y + P[n, 2, 2] * z + P[n, 2, 3]
                    if w <= 1e-6:
                        continue
                    u = (P[n, 0, 0] * x + P[n, 0, 1] * y + P[n, 0, 2] * z + P[n, 0, 3]) / w
                    v = (P[n, 1, 0] * x + P[n, 1, 1] * y + P[n, 1, 2] * z + P[n, 1, 3]) / w
                    if not (u >= 0 and u < width and v >= 0 and v < height):
                        continue
                    seen += 1
                    if masks[n, int(v), int(u)] < ALPHA_INSIDE:
                        misses += 1
                        if misses > tolerance * cells.shape[0]:
                            break
                occupied[a, b, c] = misses <= tolerance * seen and 4 * seen >= cells.shape[0]
    return occupied


def _surface(occupied: np.ndarray, axes: list[np.ndarray], step: np.ndarray):
    """Centres [n, 3] of the occupied voxels with a free neighbour, outward normals [n, 3], and the area."""
    solid = np.pad(occupied, 2)
    inside = solid[2:-2, 2:-2, 2:-2]
    neighbours = [np.roll(solid, s, k)[2:-2, 2:-2, 2:-2] for k in range(3) for s in (1, -1)]
    shell = inside & ~np.logical_and.reduce(neighbours)
    index = np.stack(np.nonzero(shell), -1)
    smooth = _box_blur(solid.astype(np.float32))
    gradient = np.stack(np.gradient(smooth), -1)[2:-2, 2:-2, 2:-2][shell] / step
    normals = -gradient / np.maximum(np.linalg.norm(gradient, axis=-1, keepdims=True), 1e-9)
    points = np.stack([axes[k][index[:, k]] for k in range(3)], -1)
    return points, normals, len(points) * float(np.prod(step)) ** (2 / 3)


def _box_blur(volume: np.ndarray) -> np.ndarray:
    for axis in range(3):
        volume = sum(np.roll(volume, s, axis) for s in (-2, -1, 0, 1, 2)) / 5
    return volume


def _on_surfaces(hulls, count: int, rng: np.random.Generator):
    """`count` jittered surface points over all moments, their normals, √area and the moment of each."""
    bins = np.arange(count) % len(hulls)
    points, normals = np.empty((count, 3)), np.empty((count, 3))
    for k, (surface, directions, _) in enumerate(hulls):
        mine = np.nonzero(bins == k)[0]
        pick = rng.choice(len(surface), len(mine), replace=len(mine) > len(surface))
        jitter = rng.uniform(-0.5, 0.5, (len(mine), 3)) * math.sqrt(hulls[k][2] / len(surface))
        points[mine], normals[mine] = surface[pick] + jitter, directions[pick]
    return points, normals, math.sqrt(float(np.mean([area for _, _, area in hulls]))), bins


def _facing_colours(dataset: Dataset, moments, points, normals, bins) -> np.ndarray:
    """Mean colour [n, 3] over the cameras of the point's moment, weighted by how squarely they face it."""
    colors, weights = np.zeros_like(points), np.full((len(points), 1), 1e-9)
    centres = dataset.camera_centres().numpy()
    P = (dataset.Ks @ dataset.viewmats[:, :3]).numpy()
    pictures = dataset.images.numpy()
    for k, cells in enumerate(moments):
        mine = np.nonzero(bins == k)[0]
        for n in cells.tolist():
            u, v, w = P[n, :, :3] @ points[mine].T + P[n, :, 3:]
            x = np.clip(u / w, 0, dataset.width - 1).astype(int)
            y = np.clip(v / w, 0, dataset.height - 1).astype(int)
            rgba = pictures[n, y, x] / 255  # without alpha, the background counts as surface: a rough start
            towards = centres[n] - points[mine]
            facing = (normals[mine] * towards).sum(-1) / np.linalg.norm(towards, axis=-1)
            weight = np.clip(facing, 0, 1)[:, None] ** 4 * rgba[:, 3:]
            colors[mine] += weight * rgba[:, :3] / np.maximum(rgba[:, 3:], 1e-3)
            weights[mine] += weight
    return np.where(weights > 1e-6, colors / weights, 0.5)
