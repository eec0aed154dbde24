"""Colour and median depth of opaque Gaussians in one pass on the CPU, for fusing their surface."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from d2.recon.raster import project as p
from d2.recon.raster import tiles
from d2.recon.raster.reference import rotation_matrices

NEAR, FAR, EPS2D = 0.01, 1e10, 0.3  # as `rasterize` has them
ONE, HALF, DARK = np.float32(1), np.float32(0.5), np.float32(0.02)
S_MAX = np.float32(6)  # the exponent beyond which every alpha is below ALPHA_MIN


def surface(
    means: Tensor,  # [N, 3] world
    quats: Tensor,  # [N, 4] wxyz, any length but zero
    scales: Tensor,  # [N, 3] > 0
    opacities: Tensor,  # [N] in 0..1
    colors: Tensor,  # [N, 3]
    viewmat: Tensor,  # [4, 4] world to camera, OpenCV
    K: Tensor,  # [3, 3] pixels
    width: int,
    height: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Colour [height, width, 3], straight alpha, and depth [height, width] along the camera's z axis; float32.

    The depth is where the transmittance of a pixel's ray falls to a half, and 0 where it does not.  A Gaussian's own
    depth along a ray is its mean there given the pixel (the conditional mean of z in the affine projection), so that
    a flat Gaussian gives the depth of its plane and not of its centre.  Everything is on the CPU, without gradients.
    """
    features = _planes(means, quats, scales, viewmat, K)
    arrays = [np.ascontiguousarray(x.numpy(), np.float32) for x in (means, quats, scales, opacities, features, colors)]
    zeros, ones = np.zeros((len(means), 3), np.float32), np.ones(len(means), np.float32)
    camera = p.pack_camera(viewmat.numpy(), K.numpy(), width, height, NEAR, FAR, EPS2D, 0.0, False)
    splats, rects = np.empty((len(means), p.SPLAT_FLOATS), np.float32), np.empty((len(means), 4), np.int32)
    keys = np.empty(len(means), np.uint64)
    still = zeros, zeros[:, 0], ones, np.zeros((len(means), 2), np.float32)
    p.project(*arrays[:5], *still, camera, splats, rects, keys)
    front_to_back = np.sort(keys)
    order = (front_to_back[: np.searchsorted(front_to_back, p.POISONED)] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    tiles_x, tiles_y = -(-width // tiles.TILE), -(-height // tiles.TILE)
    offsets, ids, _, _ = tiles.bin_splats(order, rects, keys, tiles_x, tiles_y, numba.get_num_threads())
    image, depth = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    _composite(offsets, ids, splats, arrays[5], image, depth)
    return image, depth


def _planes(means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor) -> Tensor:
    """[N, 3]: depth of the mean, and how it changes a pixel to the right and a pixel down."""
    W = viewmat[:3, :3]
    x, y, z = (means @ W.T + viewmat[:3, 3]).unsqueeze(-1).unbind(1)
    mx, my, mz = (W @ rotation_matrices(quats) * scales[:, None]).unbind(1)  # roots of the covariance, a row an axis
    z = z.clamp_min(NEAR)
    u, v = K[0, 0] / z * (mx - x / z * mz), K[1, 1] / z * (my - y / z * mz)
    uu, uv, vv = (u * u).sum(1) + EPS2D, (u * v).sum(1), (v * v).sum(1) + EPS2D
    zu, zv, det = (mz * u).sum(1), (mz * v).sum(1), uu * vv - uv * uv
    return torch.stack([z[:, 0], (vv * zu - uv * zv) / det, (uu * zv - uv * zu) / det], -1)


@njit(parallel=True, cache=True)
def _composite(offsets, ids, splats, colors, image, depth):
    """Fills image [H, W, 3] and depth [H, W]; see tiles.composite for the same in lanes."""
    height, width = depth.shape
    tiles_x = (width + tiles.TILE - 1) // tiles.TILE
    for t in prange(offsets.shape[0] - 1):
        left, top = (t % tiles_x) * tiles.TILE, (t // tiles_x) * tiles.TILE
        for y in range(top, min(top + tiles.TILE, height)):
            for x in range(left, min(left + tiles.TILE, width)):
                T, r, g, b = ONE, np.float32(0), np.float32(0), np.float32(0)
                for q in range(offsets[t], offsets[t + 1]):
                    i = ids[q]
                    dx, dy = splats[i, 0] - np.float32(x) - HALF, splats[i, 1] - np.float32(y) - HALF
                    s = dx * (splats[i, 2] * dx + splats[i, 3] * dy) + splats[i, 4] * dy * dy
                    if not (s >= 0 and s < S_MAX):
                        continue
                    alpha = min(tiles.ALPHA_MAX, splats[i, 5] * math.exp(-s))
                    if alpha < p.ALPHA_MIN:
                        continue
                    weight = alpha * T
                    r, g, b = r + weight * colors[i, 0], g + weight * colors[i, 1], b + weight * colors[i, 2]
                    if T > HALF and T - weight <= HALF:
                        depth[y, x] = splats[i, 6] - dx * splats[i, 7] - dy * splats[i, 8]
                    T -= weight
                    if T < DARK:
                        break
                covered = max(ONE - T, np.float32(1e-6))
                image[y, x, 0], image[y, x, 1], image[y, x, 2] = r / covered, g / covered, b / covered
