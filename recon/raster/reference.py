"""The dense float64 twin: every Gaussian against every pixel, in torch, as the formulas read.

Slow and memory hungry, O(N H W); it exists so that the kernels and gsplat have something to agree with.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA_MIN, ALPHA_MAX, T_MIN = 1 / 255, 0.999, 1e-4


def render(
    means: Tensor,  # [N, 3] world
    quats: Tensor,  # [N, 4] wxyz, any length
    scales: Tensor,  # [N, 3] world
    opacities: Tensor,  # [N]
    colors: Tensor,  # [N, D]
    viewmat: Tensor,  # [4, 4] world to camera, OpenCV
    K: Tensor,  # [3, 3] pixels
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    antialiased: bool = False,
    screen: Tensor | None = None,  # [N, 2] added to the projected means, pixels
) -> tuple[Tensor, Tensor]:
    """Image [H, W, D] without background and alpha [H, W], differentiable in every tensor."""
    camera = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    covariance = _world_covariance(quats, scales)
    xy, V0 = _project(camera, covariance, viewmat, K, width, height)
    if screen is not None:
        xy = xy + screen
    V = V0 + eps2d * torch.eye(2, dtype=V0.dtype)
    det, det0 = torch.linalg.det(V), torch.linalg.det(V0)
    if antialiased:
        opacities = opacities * torch.sqrt((det0 / det).clamp_min(0))
    z = camera[:, 2]
    drawn = (z > near_plane) & (z < far_plane) & (det > 0) & torch.isfinite(det)
    order = torch.argsort(z, stable=True)
    order = order[drawn[order]]
    return _composite(xy[order], torch.linalg.inv(V[order]), opacities[order], colors[order], width, height)


def slice_at(
    means: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    velocities: Tensor,  # [N, 3] world per unit of time
    times: Tensor,  # [N]
    durations: Tensor,  # [N] > 0
    t: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """The 3D Gaussians a 4D Gaussian is at time t: means [N, 3] and opacities [N]."""
    dt = t - times
    return means + dt[:, None] * velocities, opacities * torch.exp(-0.5 * (dt / durations) ** 2)


def rotation_matrices(quats: Tensor) -> Tensor:  # [N, 4] wxyz, any length -> [N, 3, 3]
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _world_covariance(quats: Tensor, scales: Tensor) -> Tensor:
    M = rotation_matrices(quats) * scales[:, None, :]
    return M @ M.mT


def _project(camera, covariance, viewmat, K, width, height) -> tuple[Tensor, Tensor]:
    """Perspective projection of the means, and of the covariances by its Jacobian (EWA)."""
    x, y, z = camera.unbind(-1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    pad_x, pad_y = 0.15 * width / fx, 0.15 * height / fy
    tx = (x / z).clamp(-cx / fx - pad_x, (width - cx) / fx + pad_x)
    ty = (y / z).clamp(-cy / fy - pad_y, (height - cy) / fy + pad_y)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * tx / z, zero, fy / z, -fy * ty / z], -1).unflatten(-1, (2, 3))
    P = J @ viewmat[:3, :3]
    return torch.stack([fx * x / z + cx, fy * y / z + cy], -1), P @ covariance @ P.mT


def _composite(xy, conic, opacities, colors, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Front to back over depth-ordered Gaussians: C = Σ c_k alpha_k Π_{j<k} (1 - alpha_j)."""
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    d = xy[:, None, None] - torch.stack([u, v], -1)  # [N, H, W, 2]
    s = 0.5 * torch.einsum("nhwi,nij,nhwj->nhw", d, conic, d)
    alpha = (opacities[:, None, None] * torch.exp(-s)).clamp_max(ALPHA_MAX)
    alpha = torch.where((alpha >= ALPHA_MIN) & (s >= 0), alpha, 0)
    alpha = torch.where(torch.cumprod(1 - alpha, 0) > T_MIN, alpha, 0)
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    return torch.einsum("nhw,nd->hwd", alpha * before, colors), 1 - (after[-1] if len(after) else 1 + 0 * s.sum(0))
