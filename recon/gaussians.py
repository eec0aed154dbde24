"""Gaussians4D, the trained representation, and Gaussians3D, what it is at one moment; raw values end here.

The velocity form: a native 4D Gaussian with mean (x, μ) and covariance [[A, b], [bᵀ, c]] sliced at time t
is the 3D Gaussian with mean x + (b/c)(t - μ), covariance A - bbᵀ/c and opacity o exp(-(t - μ)²/2c)
(Yang et al., ICLR 2024, Eqs. 6-8).  So velocity b/c, time μ and duration √c carry the same model with a
parameter fewer and no 4×4 algebra; `from_two_quaternions` is the map.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from d2 import fileio
from d2.errors import InputError
from d2.recon.raster import Motion, sh
from d2.recon.raster.reference import slice_at

MAX_GAUSSIANS = 50_000_000
FORMAT = "d2-gaussians-4d-1"
STILL_LOG_DURATION = 20.0  # ln: five hundred million clips
OPACITY_LOGIT_LIMIT = 15.0  # sigmoid rounds to 1 beyond it in float32


@dataclass(frozen=True)
class Gaussians3D:
    """Activated values, as renderers and exporters take them."""

    means: Tensor  # [N, 3] world
    quats: Tensor  # [N, 4] wxyz, unit
    scales: Tensor  # [N, 3] world, > 0
    opacities: Tensor  # [N] in 0..1
    sh: Tensor  # [N, K, 3] display-referred

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        return sh.degree_of(self.sh.shape[1])


@dataclass
class Gaussians4D:
    """Raw parameters in velocity form; time runs over 0..1."""

    means: Tensor  # [N, 3] world, at `times`
    velocities: Tensor  # [N, 3] world per unit of time
    times: Tensor  # [N]
    log_durations: Tensor  # [N] ln of the standard deviation in time
    quats: Tensor  # [N, 4] wxyz, any length but zero
    log_scales: Tensor  # [N, 3] ln world
    opacity_logits: Tensor  # [N]
    sh: Tensor  # [N, K, 3]

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        return sh.degree_of(self.sh.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The raw parameters by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, function) -> Self:
        """A new set with `function` applied to every tensor (indexing, .to, .clone, …)."""
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def still(cls, moment: Gaussians3D) -> Self:
        """A set that shows `moment` at every time."""
        zeros = torch.zeros_like(moment.opacities)
        return cls(
            means=moment.means,
            velocities=torch.zeros_like(moment.means),
            times=zeros,
            log_durations=zeros + STILL_LOG_DURATION,
            quats=moment.quats,
            log_scales=moment.scales.log(),
            opacity_logits=torch.logit(moment.opacities).clamp(-OPACITY_LOGIT_LIMIT, OPACITY_LOGIT_LIMIT),
            sh=moment.sh,
        )

    def at(self, t: float | Tensor) -> Gaussians3D:
        """The 3D Gaussians at time t; N and order are the same for every t."""
        means, opacities = slice_at(
            self.means,
            self.opacity_logits.sigmoid(),
            self.velocities,
            self.times,
            self.log_durations.exp(),
            t,
        )
        return Gaussians3D(
            means,
            torch.nn.functional.normalize(self.quats, dim=-1),
            self.log_scales.exp(),
            opacities,
            self.sh,
        )

    def activated(self, t: Tensor) -> tuple[dict[str, Tensor], Motion]:
        """What `rasterize` takes to draw this set at times t [C]: the slice happens in its kernels."""
        motion = Motion(self.velocities, self.times, self.log_durations.exp(), t)
        gaussians = {
            "means": self.means,
            "quats": self.quats,
            "scales": self.log_scales.exp(),
            "opacities": self.opacity_logits.sigmoid(),
            "colors": self.sh,
        }
        return gaussians, motion

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """One safetensors file with the raw parameters in float32."""
        tensors = {name: tensor.float() for name, tensor in self.tensors().items()}
        fileio.write_tensors(path, tensors, {"format": FORMAT} | (metadata or {}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; raises InputError for anything else, naming file and field."""
        return cls.load_with_metadata(path)[0]

    @classmethod
    def load_with_metadata(cls, path: str | Path) -> tuple[Self, dict[str, str]]:
        """Like `load`, and the metadata that `save` was given."""
        tensors, metadata = fileio.read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{fileio.quoted(path)} does not hold 4D Gaussians of format {FORMAT}")
        return cls.checked(tensors, fileio.quoted(path)), metadata

    @classmethod
    def checked(cls, tensors: dict[str, Tensor], label: str) -> Self:
        """Builds a set from named tensors, shapes and finiteness verified. Raises InputError."""
        names = [field.name for field in fields(cls)]
        if sorted(tensors) != sorted(names):
            raise InputError(f"{label}: expected tensors {', '.join(names)}; got {', '.join(sorted(tensors))}")
        means, coefficients = tensors["means"], tensors["sh"]
        N = means.shape[0] if means.ndim else 0
        K = coefficients.shape[1] if coefficients.ndim == 3 else 0
        if not 0 < N <= MAX_GAUSSIANS or K not in (1, 4, 9, 16):
            raise InputError(f"{label}: means has shape {list(means.shape)}, sh {list(coefficients.shape)}")
        shapes = {
            "means": [N, 3],
            "velocities": [N, 3],
            "quats": [N, 4],
            "log_scales": [N, 3],
            "sh": [N, K, 3],
        }
        for name, tensor in tensors.items():
            expected = shapes.get(name, [N])
            if list(tensor.shape) != expected or not tensor.is_floating_point():
                raise InputError(f"{label}: {name} must be float of shape {expected}, got {list(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise InputError(f"{label}: {name} holds NaN or infinity")
        return cls(**{name: tensors[name].float() for name in names})


def from_two_quaternions(
    means: Tensor,  # [N, 4] x y z t
    left: Tensor,  # [N, 4] wxyz, left isoclinic rotation, any length
    right: Tensor,  # [N, 4] wxyz, right isoclinic rotation, any length
    scales: Tensor,  # [N, 4] > 0, of the rotated axes x y z t
    opacities: Tensor,  # [N] in 0..1
    coefficients: Tensor,  # [N, K, 3]
) -> Gaussians4D:
    """The velocity form of a native 4D Gaussian given by two quaternions and four scales.

    Σ = R S² Rᵀ with R = L(left) M(right); velocity, duration and the conditional covariance come from its
    blocks (Schur complement).  A Gaussian whose time variance underflows raises InputError.
    """
    R = left_isoclinic(left) @ right_isoclinic(right)
    M = R * scales[:, None, :]
    covariance = M @ M.mT
    A, b, c = covariance[:, :3, :3], covariance[:, :3, 3], covariance[:, 3, 3]
    if not (c > 0).all():
        raise InputError(f"Gaussian {int((c <= 0).nonzero()[0])} has no extent in time")
    conditional = A - b[:, :, None] * b[:, None, :] / c[:, None, None]
    eigenvalues, vectors = torch.linalg.eigh(conditional.double())
    vectors = vectors * torch.linalg.det(vectors).sign()[:, None, None]  # a rotation, not a reflection
    return Gaussians4D(
        means=means[:, :3],
        velocities=b / c[:, None],
        times=means[:, 3],
        log_durations=0.5 * c.log(),
        quats=quaternions(vectors).to(means.dtype),
        log_scales=(0.5 * eigenvalues.clamp_min(1e-20).log()).to(means.dtype),
        opacity_logits=torch.logit(opacities, eps=1e-6),
        sh=coefficients,
    )


def left_isoclinic(q: Tensor) -> Tensor:  # [N, 4] wxyz -> [N, 4, 4] acting on (x, y, z, t)
    """p ↦ q p for the quaternion p = t + xi + yj + zk."""
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    return _matrix([w, -z, y, x], [z, w, -x, y], [-y, x, w, z], [-x, -y, -z, w])


def right_isoclinic(q: Tensor) -> Tensor:  # [N, 4] wxyz -> [N, 4, 4] acting on (x, y, z, t)
    """p ↦ p q for the quaternion p = t + xi + yj + zk."""
    w, x, y, z = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    return _matrix([w, z, -y, x], [-z, w, x, y], [y, -x, w, z], [-x, -y, -z, w])


def quaternions(rotations: Tensor) -> Tensor:  # [N, 3, 3] -> [N, 4] wxyz, unit, w ≥ 0
    """Inverse of `rotation_matrices`, by the largest of the four components (Shepperd 1978)."""
    R = rotations
    trace = R[:, 0, 0] + R[:, 1, 1] + R[:, 2, 2]
    diagonal = torch.stack([trace, R[:, 0, 0], R[:, 1, 1], R[:, 2, 2]], -1)
    squares = 1 + 2 * diagonal - trace[:, None]  # 4 w², 4 x², 4 y², 4 z²
    a, b, c = R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]
    d, e, f = R[:, 1, 0] + R[:, 0, 1], R[:, 0, 2] + R[:, 2, 0], R[:, 2, 1] + R[:, 1, 2]
    s0, s1, s2, s3 = squares.unbind(-1)
    candidates = torch.stack(
        [torch.stack(row, -1) for row in ([s0, a, b, c], [a, s1, d, e], [b, d, s2, f], [c, e, f, s3])], 1
    )
    best = candidates[torch.arange(len(R)), squares.argmax(-1)]
    best = torch.nn.functional.normalize(best, dim=-1)
    return torch.where(best[:, :1] < 0, -best, best)


def _matrix(*rows: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
