"""Real spherical harmonics up to degree 3 in the sign and order convention of 3D Gaussian Splatting."""

from __future__ import annotations

import torch
from torch import Tensor

C0 = 0.28209479177387814  # 1 / (2 √π)
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
_C3 = (
    -0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154,
    -0.4570457994644658, 1.445305721320277, -0.5900435899266435,
)  # fmt: skip


def bases(degree: int) -> int:
    """K, the number of basis functions up to a degree."""
    return (degree + 1) ** 2


def degree_of(K: int) -> int:
    """The degree whose basis has K functions; K must be 1, 4, 9 or 16."""
    return {1: 0, 4: 1, 9: 2, 16: 3}[K]


def evaluate(
    degree: int,
    directions: Tensor,  # [..., N, 3] from the camera to the Gaussian, any length
    sh: Tensor,  # [N, K, 3] with K ≥ (degree + 1)²
) -> Tensor:
    """Colours [..., N, 3], display-referred, clamped below at 0 as in gsplat."""
    color = C0 * sh[:, 0] + 0.5
    if degree > 0:
        basis = _basis(degree, torch.nn.functional.normalize(directions, dim=-1))
        color = color + torch.einsum("...nk,nkc->...nc", basis, sh[:, 1 : bases(degree)])
    return color.clamp_min(0)


def rgb_to_sh0(rgb: Tensor) -> Tensor:
    """The degree-0 coefficient that shows `rgb` from everywhere."""
    return (rgb - 0.5) / C0


def _basis(degree: int, unit: Tensor) -> Tensor:
    """Basis values [..., N, K - 1] without the constant one."""
    x, y, z = unit.unbind(-1)
    values = [-_C1 * y, _C1 * z, -_C1 * x]
    if degree > 1:
        xx, yy, zz = x * x, y * y, z * z
        values += [
            _C2[0] * x * y, _C2[1] * y * z, _C2[2] * (2 * zz - xx - yy), _C2[3] * x * z, _C2[4] * (xx - yy)
        ]  # fmt: skip
    if degree > 2:
        values += [
            _C3[0] * y * (3 * xx - yy), _C3[1] * x * y * z, _C3[2] * y * (4 * zz - xx - yy),
            _C3[3] * z * (2 * zz - 3 * xx - 3 * yy), _C3[4] * x * (4 * zz - xx - yy),
            _C3[5] * z * (xx - yy), _C3[6] * x * (xx - 3 * yy),
        ]  # fmt: skip
    return torch.stack(values, -1)
