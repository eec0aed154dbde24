"""Turning Gaussians into the axes other tools expect: means, rotations and colour together."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from d2.camera import TO_RDF, TO_Y_UP
from d2.recon.gaussians import Gaussians3D, Gaussians4D, quaternions
from d2.recon.raster import sh as spherical

Frame = Literal["rdf", "rub", "world"]

# p' = A p, from our world (z up, front on -y) to the frame of that name.
FROM_WORLD: dict[str, np.ndarray] = {"rdf": TO_RDF, "rub": TO_Y_UP, "world": np.eye(3)}
_DIRECTIONS = 64  # sampled to find the rotation of a band; 7 unknowns a column at degree 3


def to_frame(gaussians: Gaussians3D, frame: Frame) -> Gaussians3D:
    """From our world to `frame`."""
    return rotate(gaussians, FROM_WORLD[frame])


def from_frame(gaussians: Gaussians3D, frame: Frame) -> Gaussians3D:
    """From `frame` to our world."""
    return rotate(gaussians, FROM_WORLD[frame].T)


def rotate(
    gaussians: Gaussians3D,
    rotation: np.ndarray,  # [3, 3], p' = rotation p
) -> Gaussians3D:
    """The same object, turned: seen along a turned direction it shows the same colours."""
    if np.array_equal(rotation, np.eye(3)):
        return gaussians
    R = torch.as_tensor(rotation, dtype=gaussians.means.dtype, device=gaussians.means.device)
    return Gaussians3D(
        means=gaussians.means @ R.T,
        quats=_product(quaternions(R[None]), gaussians.quats),
        scales=gaussians.scales,
        opacities=gaussians.opacities,
        sh=rotate_sh(gaussians.sh, rotation),
    )


def move(
    gaussians: Gaussians4D,
    rotation: np.ndarray,  # [3, 3], p' = scale rotation p + offset
    scale: float = 1.0,
    offset: np.ndarray | None = None,  # [3]
) -> Gaussians4D:
    """The same motion turned, scaled and moved: colours turn along, as in `rotate`."""
    g = gaussians
    R = torch.as_tensor(rotation, dtype=g.means.dtype, device=g.means.device)
    shift = torch.as_tensor(np.zeros(3) if offset is None else offset, dtype=g.means.dtype, device=g.means.device)
    still = np.array_equal(rotation, np.eye(3))
    return Gaussians4D(
        means=scale * g.means @ R.T + shift,
        velocities=scale * g.velocities @ R.T,
        times=g.times,
        log_durations=g.log_durations,
        quats=g.quats if still else _product(quaternions(R[None]), g.quats),
        log_scales=g.log_scales + math.log(scale),
        opacity_logits=g.opacity_logits,
        sh=g.sh if still else rotate_sh(g.sh, rotation),
    )


def rotate_sh(
    coefficients: Tensor,  # [N, K, 3]
    rotation: np.ndarray,  # [3, 3], d' = rotation d
) -> Tensor:  # [N, K, 3]
    """Coefficients c' with evaluate(rotation d, c') = evaluate(d, c) for every direction d."""
    bands = [coefficients[:, :1]]
    for degree in range(1, spherical.degree_of(coefficients.shape[1]) + 1):
        D = band_rotation(degree, rotation).to(coefficients)
        band = coefficients[:, spherical.bases(degree - 1) : spherical.bases(degree)]
        bands.append(torch.einsum("ij,njc->nic", D, band))
    return torch.cat(bands, 1)


def band_rotation(
    degree: int,
    rotation: np.ndarray,  # [3, 3]
) -> Tensor:  # [2l+1, 2l+1] float64
    """The matrix D that turns the coefficients of one band: basis(R d) D = basis(d) for every d.

    Bands never mix under a rotation, so the equation has an exact solution; sampling it in more directions
    than unknowns and solving in float64 gives it to rounding, in whatever sign convention the basis has.
    """
    directions = _fibonacci_sphere(_DIRECTIONS)
    turned = directions @ torch.as_tensor(rotation, dtype=torch.float64).T
    return torch.linalg.lstsq(_band(degree, turned), _band(degree, directions)).solution


def _band(degree: int, directions: Tensor) -> Tensor:  # [n, 3] -> [n, 2l+1] float64
    """Basis values of one band, read off `evaluate`, which is 0.5 + basis · coefficients while positive."""
    first, last = spherical.bases(degree - 1), spherical.bases(degree)
    probe = 0.1  # small enough for 0.5 + 0.1 basis to stay positive: no basis function exceeds 3
    columns = []
    for k in range(first, last):
        coefficients = torch.zeros(1, last, 3, dtype=torch.float64)
        coefficients[:, k] = probe
        columns.append((spherical.evaluate(degree, directions, coefficients)[:, 0] - 0.5) / probe)
    return torch.stack(columns, -1)


def _fibonacci_sphere(count: int) -> Tensor:  # [count, 3] float64, unit
    k = torch.arange(count, dtype=torch.float64)
    z = 1 - (2 * k + 1) / count
    angle = k * (torch.pi * (3 - 5**0.5))
    ring = (1 - z * z).sqrt()
    return torch.stack([ring * angle.cos(), ring * angle.sin(), z], -1)


def _product(a: Tensor, b: Tensor) -> Tensor:  # [..., 4] wxyz each
    """Hamilton product: the rotation b followed by a."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )
