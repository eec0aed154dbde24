"""What a rasterizer needs of 4D Gaussians given by two quaternions: numba kernels, and a torch twin for CUDA.

d2.recon.gaussians.from_two_quaternions is the same map.  This one has a gradient where eigenvalues meet, as they do
when every Gaussian starts round, and costs about as much as the map does in the CUDA kernels of the original.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from d2.recon.gaussians import left_isoclinic, quaternions, right_isoclinic

GAP = 1e-4  # of the largest eigenvalue: nearer ones count as equal, and turning them changes nothing
LEAST = 1e-20  # of a variance
L, R, M, S, D, V, Q, SCALES, G, T = range(10)  # what the matrices of a thread's work space hold
ROOM = 10


def velocity_form(
    left: Tensor,  # [N, 4] wxyz, left isoclinic rotation, any length
    right: Tensor,  # [N, 4] wxyz, right isoclinic rotation, any length
    log_scales: Tensor,  # [N, 4] of the rotated axes x y z t
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """velocities [N, 3], durations [N], quats [N, 4] wxyz unit and scales [N, 3] of the slice at any time."""
    if left.device.type == "cpu":
        return _Sliced.apply(left, right, log_scales)  # type: ignore[return-value]
    return velocity_form_reference(left, right, log_scales)


def velocity_form_reference(left: Tensor, right: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The twin, in torch."""
    M = left_isoclinic(left) @ right_isoclinic(right) * log_scales.exp()[:, None]
    covariance = M @ M.mT
    A, b, c = covariance[:, :3, :3], covariance[:, :3, 3], covariance[:, 3, 3]
    quats, scales = _Principal.apply(A - b[:, :, None] * b[:, None, :] / c[:, None, None])  # type: ignore[misc]
    return b / c[:, None], c.sqrt(), quats, scales


class _Principal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Rotation (quaternion) and standard deviations of a covariance [N, 3, 3]."""
        values, vectors = torch.linalg.eigh(covariance.double())
        vectors = vectors * torch.linalg.det(vectors).sign()[:, None, None]
        quats, scales = quaternions(vectors).to(covariance), values.clamp_min(LEAST).sqrt().to(covariance)
        ctx.save_for_backward(vectors.to(covariance), quats, scales)
        return quats, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_quats: Tensor, g_scales: Tensor):  # type: ignore[override]
        vectors, quats, scales = ctx.saved_tensors
        w, x, y, z = quats.unbind(-1)
        turns = [torch.stack(t, -1) for t in ([-x, w, z, -y], [-y, -z, w, x], [-z, y, -x, w])]
        gx, gy, gz = (0.5 * (g_quats * turn).sum(-1) for turn in turns)  # by a turn about each axis
        v0, v1, v2 = (scales * scales).unbind(-1)
        least = (GAP * torch.maximum(torch.maximum(v0, v1), v2)).square()
        G = torch.diag_embed(g_scales / (2 * scales))
        for i, j, g, gap in ((0, 1, gz, v0 - v1), (0, 2, gy, v2 - v0), (1, 2, gx, v1 - v2)):
            G[:, i, j] = G[:, j, i] = 0.5 * g * gap / (gap * gap + least)
        return vectors @ G @ vectors.mT


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        arrays = [_float64(tensor) for tensor in tensors]
        N = len(arrays[0])
        found = [np.empty((N, 3)), np.empty(N), np.empty((N, 4)), np.empty((N, 3))]
        _slice(get_num_threads(), *arrays, *found)
        ctx.arrays = arrays
        return tuple(torch.from_numpy(array).to(tensors[0].dtype) for array in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor):  # type: ignore[override]
        given = [_float64(gradient) for gradient in gradients]
        found = [np.empty_like(array) for array in ctx.arrays]
        _slice_backward(get_num_threads(), *ctx.arrays, *given, *found)
        return tuple(torch.from_numpy(array).to(gradients[0].dtype) for array in found)


def _float64(tensor: Tensor) -> np.ndarray:  # one type, so that the kernels compile once
    return np.ascontiguousarray(tensor.detach().numpy(), np.float64)


@njit(parallel=True, cache=True)
def _slice(parts, left, right, log_scales, velocities, durations, quats, scales):
    N = len(left)
    for part in prange(parts):
        w = np.empty((ROOM, 4, 4))  # work space of a thread: small arrays of its own would cost more than the sums
        for i in range(part * N // parts, (part + 1) * N // parts):
            _decompose(left[i], right[i], log_scales[i], w)
            c = w[S, 3, 3]
            durations[i] = math.sqrt(c)
            for k in range(4):
                quats[i, k] = w[Q, 0, k]
            for k in range(3):
                velocities[i, k] = w[S, k, 3] / c
                scales[i, k] = math.sqrt(max(w[D, k, k], LEAST))


@njit(parallel=True, cache=True)
def _slice_backward(
    parts, left, right, log_scales, g_velocities, g_durations, g_quats, g_scales, g_left, g_right, g_logs
):
    N = len(left)
    for part in prange(parts):
        w = np.empty((ROOM, 4, 4))
        for i in range(part * N // parts, (part + 1) * N // parts):
            _decompose(left[i], right[i], log_scales[i], w)
            _by_conditional(w, g_quats[i], g_scales[i])
            _by_covariance(w, g_velocities[i], g_durations[i])
            _product(w[G], w[M], w[T])  # half the gradient by M
            for k in range(4):
                total = 0.0
                for j in range(4):
                    total += 2 * w[T, j, k] * w[M, j, k]
                    w[T, j, k] *= 2 * w[SCALES, 0, k]  # by the rotation
                g_logs[i, k] = total
            _product_transposed(w[T], w[R], w[G])
            g = w[G]
            x = g[0, 3] - g[1, 2] + g[2, 1] - g[3, 0]
            y = g[0, 2] + g[1, 3] - g[2, 0] - g[3, 1]
            z = g[1, 0] - g[0, 1] + g[2, 3] - g[3, 2]
            _through_length(left[i], g[0, 0] + g[1, 1] + g[2, 2] + g[3, 3], x, y, z, g_left[i])
            for j in range(4):
                for k in range(4):
                    total = 0.0
                    for m in range(4):
                        total += w[L, m, j] * w[T, m, k]
                    g[j, k] = total
            x = g[0, 3] + g[1, 2] - g[2, 1] - g[3, 0]
            y = g[1, 3] - g[0, 2] + g[2, 0] - g[3, 1]
            z = g[0, 1] - g[1, 0] + g[2, 3] - g[3, 2]
            _through_length(right[i], g[0, 0] + g[1, 1] + g[2, 2] + g[3, 3], x, y, z, g_right[i])


@njit(cache=True)
def _decompose(left, right, log_scales, w):
    """Fills L and R, the isoclinic rotations; M = L R diag(s); S = M Mᵀ; D, eigenvalues of its conditional; V; Q; s."""
    a, x, y, z = _unit(left)
    _fill(w[L], a, -z, y, x, z, a, -x, y, -y, x, a, z, -x, -y, -z, a)
    a, x, y, z = _unit(right)
    _fill(w[R], a, z, -y, x, -z, a, x, y, y, -x, a, z, -x, -y, -z, a)
    _product(w[L], w[R], w[M])
    for k in range(4):
        w[SCALES, 0, k] = math.exp(log_scales[k])
        for j in range(4):
            w[M, j, k] *= w[SCALES, 0, k]
    _product_transposed(w[M], w[M], w[S])
    for i in range(3):
        for j in range(3):
            w[D, i, j] = w[S, i, j] - w[S, i, 3] * w[S, j, 3] / w[S, 3, 3]
            w[V, i, j] = 1.0 if i == j else 0.0
    _diagonalise(w[D], w[V])
    _quaternion(w[V], w[Q, 0])


@njit(cache=True)
def _unit(q):
    a, x, y, z = q[0], q[1], q[2], q[3]
    length = math.sqrt(a * a + x * x + y * y + z * z)
    return a / length, x / length, y / length, z / length


@njit(cache=True)
def _fill(matrix, a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):
    matrix[0, 0], matrix[0, 1], matrix[0, 2], matrix[0, 3] = a, b, c, d
    matrix[1, 0], matrix[1, 1], matrix[1, 2], matrix[1, 3] = e, f, g, h
    matrix[2, 0], matrix[2, 1], matrix[2, 2], matrix[2, 3] = i, j, k, m
    matrix[3, 0], matrix[3, 1], matrix[3, 2], matrix[3, 3] = n, o, p, q


@njit(cache=True)
def _product(a, b, out):
    """a b."""
    for i in range(4):
        for j in range(4):
            total = 0.0
            for k in range(4):
                total += a[i, k] * b[k, j]
            out[i, j] = total


@njit(cache=True)
def _product_transposed(a, b, out):
    """a bᵀ."""
    for i in range(4):
        for j in range(4):
            total = 0.0
            for k in range(4):
                total += a[i, k] * b[j, k]
            out[i, j] = total


@njit(cache=True)
def _through_length(q, ga, gx, gy, gz, out):
    """The gradient by q [4] of what depends on q's direction alone."""
    a, x, y, z = _unit(q)
    along = a * ga + x * gx + y * gy + z * gz
    length = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
    out[0], out[1] = (ga - a * along) / length, (gx - x * along) / length
    out[2], out[3] = (gy - y * along) / length, (gz - z * along) / length


@njit(cache=True)
def _diagonalise(D, V):
    """Jacobi's method on the upper left 3 × 3: eigenvalues on D's diagonal, V the rotation of eigenvectors."""
    for _ in range(8):
        if abs(D[0, 1]) + abs(D[0, 2]) + abs(D[1, 2]) <= 1e-15 * (D[0, 0] + D[1, 1] + D[2, 2]):
            break
        for pair in range(3):
            p, q = (0, pair + 1) if pair < 2 else (1, 2)
            if D[p, q] == 0.0:
                continue
            theta = (D[q, q] - D[p, p]) / (2 * D[p, q])
            t = (1.0 if theta >= 0 else -1.0) / (abs(theta) + math.sqrt(theta * theta + 1))
            c = 1 / math.sqrt(t * t + 1)
            s = t * c
            for k in range(3):
                D[k, p], D[k, q] = c * D[k, p] - s * D[k, q], s * D[k, p] + c * D[k, q]
            for k in range(3):
                D[p, k], D[q, k] = c * D[p, k] - s * D[q, k], s * D[p, k] + c * D[q, k]
                V[k, p], V[k, q] = c * V[k, p] - s * V[k, q], s * V[k, p] + c * V[k, q]


@njit(cache=True)
def _quaternion(R, q):
    """wxyz of the rotation in the upper left 3 × 3, by the largest of the four components (Shepperd 1978)."""
    trace = R[0, 0] + R[1, 1] + R[2, 2]
    i = 0
    for k in range(1, 3):
        if R[k, k] > R[i, i]:
            i = k
    if trace >= R[i, i]:
        q[0], q[1], q[2], q[3] = 1 + trace, R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]
    else:
        j, k = (i + 1) % 3, (i + 2) % 3
        q[0], q[1 + i] = R[k, j] - R[j, k], 1 + 2 * R[i, i] - trace
        q[1 + j], q[1 + k] = R[j, i] + R[i, j], R[k, i] + R[i, k]
    length = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
    for k in range(4):
        q[k] /= length


@njit(cache=True)
def _by_conditional(w, g, g_scale):
    """Fills G's upper left 3 × 3 with the gradient by the conditional covariance, from those by quaternion and scales.

    In the axes V a turn ω changes it by ω D - D ω, so that off the diagonal the turn's gradient over twice the gap of
    the eigenvalues is the covariance's.
    """
    q, gap, turn = w[Q, 0], w[Q, 1], w[Q, 2]
    turn[2] = 0.5 * (-q[1] * g[0] + q[0] * g[1] + q[3] * g[2] - q[2] * g[3])  # of axes 1 and 2: about the first
    turn[1] = 0.5 * (-q[2] * g[0] - q[3] * g[1] + q[0] * g[2] + q[1] * g[3])
    turn[0] = 0.5 * (-q[3] * g[0] + q[2] * g[1] - q[1] * g[2] + q[0] * g[3])
    v0, v1, v2 = w[D, 0, 0], w[D, 1, 1], w[D, 2, 2]
    gap[0], gap[1], gap[2] = v0 - v1, v2 - v0, v1 - v2
    least = (GAP * max(v0, v1, v2)) ** 2
    own = w[T]
    for k in range(3):
        own[k, k] = g_scale[k] / (2 * math.sqrt(max(w[D, k, k], LEAST)))
        i, j = (0, k + 1) if k < 2 else (1, 2)
        own[i, j] = own[j, i] = 0.5 * turn[k] * gap[k] / (gap[k] * gap[k] + least)
    for i in range(3):
        for j in range(3):
            total = 0.0
            for k in range(3):
                for m in range(3):
                    total += w[V, i, k] * own[k, m] * w[V, j, m]
            w[G, i, j] = total


@njit(cache=True)
def _by_covariance(w, g_velocity, g_duration):
    """Fills the rest of G, so that it is the gradient by the 4D covariance S."""
    c = w[S, 3, 3]
    twice, along = 0.0, 0.0
    for k in range(3):
        pulled = 0.0
        for j in range(3):
            pulled += w[G, k, j] * w[S, j, 3]
        twice += w[S, k, 3] * pulled
        along += w[S, k, 3] * g_velocity[k]
        w[G, k, 3] = w[G, 3, k] = 0.5 * (g_velocity[k] - 2 * pulled) / c
    w[G, 3, 3] = (twice - along) / (c * c) + g_duration / (2 * math.sqrt(c))
