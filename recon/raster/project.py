"""CPU kernels over Gaussians: slice at time t and project (EWA), forward and backward, one fused loop each.

The mathematics of gsplat's classic projection (Zwicker et al. 2001; Kerbl et al. 2023) after the slice
mean(t) = mean + velocity (t - time), opacity(t) = opacity exp(-½ ((t - time) / duration)²).  The dense
twin is recon/raster/reference.py.  A Gaussian that cannot be seen (behind the camera, off the image,
fainter than 1/255 at time t, or overflowing float32 on the way) gets the sort key INVISIBLE.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

f4 = np.float32
ALPHA_MIN = f4(1 / 255)  # fainter contributions are skipped, as in gsplat
SPLAT_FLOATS = 9  # mean x y | half conic xx, conic xy, half conic yy | opacity | r g b
INVISIBLE = np.uint64(0xFFFFFFFFFFFFFFFF)  # larger than any key of a visible Gaussian
POISONED = np.uint64(0xFFFFFFFFFFFFFFFE)  # key of a Gaussian with a parameter that is NaN or infinite
CAMERA_FLOATS = 23  # layout of a packed camera:
VIEW, FX, FY, CX, CY, WIDTH, HEIGHT, NEAR, FAR, EPS2D, TIME, ANTIALIASED = 0, *range(12, CAMERA_FLOATS)
ZERO, HALF, ONE, TWO, INF = f4(0), f4(0.5), f4(1), f4(2), f4(np.inf)
# No `nnan` or `ninf`: overflow must be seen, not assumed away.
SAFE = {"contract", "arcp"}


def pack_camera(viewmat, K, width, height, near, far, eps2d, time, antialiased):
    """float32 [23]: rows of [R | t] (12), fx fy cx cy, width height, near far, eps2d, time, antialiased."""
    camera = np.empty(CAMERA_FLOATS, f4)
    camera[:12] = viewmat[:3].ravel()
    camera[12:] = K[0, 0], K[1, 1], K[0, 2], K[1, 2], width, height, near, far, eps2d, time, antialiased
    return camera


@njit
def _row(a, i):
    return a[i, 0], a[i, 1], a[i, 2]


@njit
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit
def _sum(s, a, t, b):
    """s a + t b"""
    return s * a[0] + t * b[0], s * a[1] + t * b[1], s * a[2] + t * b[2]


@njit
def _times(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


@njit
def _apply(rows, v):
    return _dot(rows[0], v), _dot(rows[1], v), _dot(rows[2], v)


@njit
def _apply_transposed(rows, v):
    return _sum(ONE, _sum(v[0], rows[0], v[1], rows[1]), v[2], rows[2])


@njit
def _store(a, i, v):
    a[i, 0], a[i, 1], a[i, 2] = v


@njit
def _world_to_camera(c):
    return (c[0], c[1], c[2]), (c[4], c[5], c[6]), (c[8], c[9], c[10])


@njit
def _unit(quats, i):
    """The unit quaternion w x y z and 1/length; not finite for a zero quaternion."""
    w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
    n = ONE / math.sqrt(w * w + x * x + y * y + z * z)
    return w * n, x * n, y * n, z * n, n


@njit
def _rotation(w, x, y, z):
    """Rows of the rotation matrix of a unit quaternion."""
    return (
        (ONE - TWO * (y * y + z * z), TWO * (x * y - w * z), TWO * (x * z + w * y)),
        (TWO * (x * y + w * z), ONE - TWO * (x * x + z * z), TWO * (y * z - w * x)),
        (TWO * (x * z - w * y), TWO * (y * z + w * x), ONE - TWO * (x * x + y * y)),
    )


@njit
def _slope_limits(f, centre, size):
    """Range of x/z within which the Jacobian is evaluated: the view and 15 % of its size on each side."""
    pad = f4(0.15) * size
    return -(centre + pad) / f, (size - centre + pad) / f


@njit
def _jacobian(c, x, y, z):
    """Rows (j00, 0, j02), (0, j11, j12) of the projection's Jacobian, and the clamped slopes x/z, y/z."""
    low_x, high_x = _slope_limits(c[FX], c[CX], c[WIDTH])
    low_y, high_y = _slope_limits(c[FY], c[CY], c[HEIGHT])
    tx, ty = min(max(x / z, low_x), high_x), min(max(y / z, low_y), high_y)
    rz = ONE / z
    return c[FX] * rz, -c[FX] * rz * tx, c[FY] * rz, -c[FY] * rz * ty, tx, ty


@njit
def _footprint(c, j00, j02, j11, j12, rotation):
    """P = J W and P R, two rows each: with M = P R S the covariance on the image is M Mᵀ."""
    w = _world_to_camera(c)
    p0, p1 = _sum(j00, w[0], j02, w[2]), _sum(j11, w[1], j12, w[2])
    return p0, p1, _apply_transposed(rotation, p0), _apply_transposed(rotation, p1)


@njit
def _is_finite(means, quats, scales, opacities, colors, velocities, times, durations, offsets, i):
    """x · 0 is 0 for every finite x and NaN for all others; a duration may be infinite."""
    zero = opacities[i] * ZERO + times[i] * ZERO + quats[i, 3] * ZERO + ZERO / durations[i]
    zero += offsets[i, 0] * ZERO + offsets[i, 1] * ZERO
    for k in range(3):
        zero += means[i, k] * ZERO + quats[i, k] * ZERO + scales[i, k] * ZERO
        zero += colors[i, k] * ZERO + velocities[i, k] * ZERO
    return zero == ZERO


@njit(parallel=True, error_model="numpy", fastmath=SAFE, cache=True)
def project(means, quats, scales, opacities, colors, velocities, times, durations, offsets, c, splats, rects, keys):
    """Fills splats [N, 9], rects [N, 4] (x0 x1 y0 y1 in pixels) and keys [N] (depth bits << 32 | index)."""
    for i in prange(means.shape[0]):
        keys[i] = INVISIBLE
        if not _is_finite(means, quats, scales, opacities, colors, velocities, times, durations, offsets, i):
            keys[i] = POISONED
            continue
        dt = c[TIME] - times[i]
        u = dt / durations[i]
        o = opacities[i] * math.exp(-HALF * u * u)
        if not o >= ALPHA_MIN:
            continue
        mean = _sum(ONE, _row(means, i), dt, _row(velocities, i))
        x, y, z = _apply(_world_to_camera(c), mean)
        x, y, z = x + c[3], y + c[7], z + c[11]
        if not (z > c[NEAR] and z < c[FAR]):
            continue
        qw, qx, qy, qz, _ = _unit(quats, i)
        j00, j02, j11, j12, _, _ = _jacobian(c, x, y, z)
        _, _, pr0, pr1 = _footprint(c, j00, j02, j11, j12, _rotation(qw, qx, qy, qz))
        m0, m1 = _times(pr0, _row(scales, i)), _times(pr1, _row(scales, i))
        v00, v01, v11 = _dot(m0, m0), _dot(m0, m1), _dot(m1, m1)
        s00, s11 = v00 + c[EPS2D], v11 + c[EPS2D]
        det = s00 * s11 - v01 * v01
        if not (det > ZERO and det < INF):
            continue
        if c[ANTIALIASED] > ZERO:
            o *= math.sqrt(max(v00 * v11 - v01 * v01, ZERO) / det)
            if not o >= ALPHA_MIN:
                continue
        px, py = c[FX] * x / z + c[CX] + offsets[i, 0], c[FY] * y / z + c[CY] + offsets[i, 1]
        reach = TWO * math.log(o / ALPHA_MIN)
        ex, ey = math.sqrt(reach * s00), math.sqrt(reach * s11)
        if not (px + ex > ZERO and px - ex < c[WIDTH] and py + ey > ZERO and py - ey < c[HEIGHT]):
            continue
        # Pixel j has its centre at j + ½: from the first to one past the last that the ellipse can reach.
        rects[i, 0] = math.ceil(max(px - ex - HALF, ZERO))
        rects[i, 1] = math.floor(min(px + ex - HALF, c[WIDTH] - ONE)) + ONE
        rects[i, 2] = math.ceil(max(py - ey - HALF, ZERO))
        rects[i, 3] = math.floor(min(py + ey - HALF, c[HEIGHT] - ONE)) + ONE
        if rects[i, 1] <= rects[i, 0] or rects[i, 3] <= rects[i, 2]:
            continue
        splats[i, 0], splats[i, 1] = px, py
        splats[i, 2], splats[i, 3], splats[i, 4] = HALF * s11 / det, -v01 / det, HALF * s00 / det
        splats[i, 5], splats[i, 6], splats[i, 7], splats[i, 8] = o, colors[i, 0], colors[i, 1], colors[i, 2]
        keys[i] = (np.uint64(f4(z).view(np.uint32)) << np.uint64(32)) | np.uint64(i)


@njit
def _covariance_gradient(m0, m1, eps, g_xx, g_xy, g_yy):
    """dL/dV = -V⁻¹ G V⁻¹ (three entries) from the gradient of the half-conic form, and V⁻¹ itself."""
    v00, v01, v11 = _dot(m0, m0) + eps, _dot(m0, m1), _dot(m1, m1) + eps
    det = v00 * v11 - v01 * v01
    a, b, d = v11 / det, -v01 / det, v00 / det
    g00, g01, g11 = HALF * g_xx, HALF * g_xy, HALF * g_yy
    left00, left01 = a * g00 + b * g01, a * g01 + b * g11
    left10, left11 = b * g00 + d * g01, b * g01 + d * g11
    return -(left00 * a + left01 * b), -(left00 * b + left01 * d), -(left10 * b + left11 * d), a, b, d


@njit
def _compensation_gradient(m0, m1, a, b, d):
    """The antialiasing factor √(det V₀ / det V) and d ln(factor)/dV = ½ (V₀⁻¹ - V⁻¹), V = V₀ + eps."""
    v00, v01, v11 = _dot(m0, m0), _dot(m0, m1), _dot(m1, m1)
    det = v00 * v11 - v01 * v01
    factor = math.sqrt(max(det, ZERO) * (a * d - b * b))
    if not det > ZERO:
        return factor, ZERO, ZERO, ZERO
    return factor, HALF * (v11 / det - a), HALF * (-v01 / det - b), HALF * (v00 / det - d)


@njit
def _quaternion_gradient(out, i, w, x, y, z, n, p0, p1, g0, g1):
    """Through R(q / |q|), where dL/dR[j][k] = p0[j] g0[k] + p1[j] g1[k]."""
    d0, d1, d2 = _sum(p0[0], g0, p1[0], g1), _sum(p0[1], g0, p1[1], g1), _sum(p0[2], g0, p1[2], g1)
    gw = TWO * (x * (d2[1] - d1[2]) + y * (d0[2] - d2[0]) + z * (d1[0] - d0[1]))
    gx = TWO * (y * (d0[1] + d1[0]) + z * (d0[2] + d2[0]) + w * (d2[1] - d1[2]) - TWO * x * (d1[1] + d2[2]))
    gy = TWO * (x * (d0[1] + d1[0]) + z * (d1[2] + d2[1]) + w * (d0[2] - d2[0]) - TWO * y * (d0[0] + d2[2]))
    gz = TWO * (x * (d0[2] + d2[0]) + y * (d1[2] + d2[1]) + w * (d1[0] - d0[1]) - TWO * z * (d0[0] + d1[1]))
    radial = gw * w + gx * x + gy * y + gz * z
    out[i, 0], out[i, 1] = n * (gw - radial * w), n * (gx - radial * x)
    out[i, 2], out[i, 3] = n * (gy - radial * y), n * (gz - radial * z)


@njit(parallel=True, error_model="numpy", fastmath=SAFE, cache=True)
def project_backward(
    means, quats, scales, opacities, velocities, times, durations, c, starts, rows,
    g_means, g_quats, g_scales, g_opacities, g_colors, g_velocities, g_times, g_durations, g_offsets, g_views,
):  # fmt: skip
    """From rows [sum of tiles, 9], one gradient of a splat for each tile it touches, to its parameters.

    rows[starts[i] : starts[i + 1]] belong to Gaussian i; they are summed in place, in that order, so that
    the result does not depend on the thread count.  g_views [N or 0, 12] takes dL/d[R | t].
    """
    for i in prange(means.shape[0]):
        s = starts[i]
        if starts[i + 1] == s:
            continue
        for q in range(s + 1, starts[i + 1]):
            for k in range(SPLAT_FLOATS):
                rows[s, k] += rows[q, k]
        dt = c[TIME] - times[i]
        u = dt / durations[i]
        fade = math.exp(-HALF * u * u)
        velocity = _row(velocities, i)
        mean = _sum(ONE, _row(means, i), dt, velocity)
        w = _world_to_camera(c)
        x, y, z = _apply(w, mean)
        x, y, z = x + c[3], y + c[7], z + c[11]
        qw, qx, qy, qz, inverse_length = _unit(quats, i)
        rotation = _rotation(qw, qx, qy, qz)
        j00, j02, j11, j12, tx, ty = _jacobian(c, x, y, z)
        p0, p1, pr0, pr1 = _footprint(c, j00, j02, j11, j12, rotation)
        scale = _row(scales, i)
        m0, m1 = _times(pr0, scale), _times(pr1, scale)

        g_o = rows[s, 5]
        v00, v01, v11, a, b, d = _covariance_gradient(m0, m1, c[EPS2D], rows[s, 2], rows[s, 3], rows[s, 4])
        if c[ANTIALIASED] > ZERO:
            factor, k00, k01, k11 = _compensation_gradient(m0, m1, a, b, d)
            g_ln = g_o * factor * opacities[i] * fade
            v00, v01, v11 = v00 + g_ln * k00, v01 + g_ln * k01, v11 + g_ln * k11
            g_o *= factor
        gm0, gm1 = _sum(TWO * v00, m0, TWO * v01, m1), _sum(TWO * v01, m0, TWO * v11, m1)
        _store(g_scales, i, _sum(ONE, _times(gm0, pr0), ONE, _times(gm1, pr1)))
        gpr0, gpr1 = _times(gm0, scale), _times(gm1, scale)
        _quaternion_gradient(g_quats, i, qw, qx, qy, qz, inverse_length, p0, p1, gpr0, gpr1)
        gp0, gp1 = _apply(rotation, gpr0), _apply(rotation, gpr1)

        g_px, g_py, rz = rows[s, 0], rows[s, 1], ONE / z
        fx, fy = c[FX] * rz, c[FY] * rz
        low_x, high_x = _slope_limits(c[FX], c[CX], c[WIDTH])
        low_y, high_y = _slope_limits(c[FY], c[CY], c[HEIGHT])
        gj02, gj12 = _dot(gp0, w[2]), _dot(gp1, w[2])
        g_tx = -fx * gj02 if tx > low_x and tx < high_x else ZERO
        g_ty = -fy * gj12 if ty > low_y and ty < high_y else ZERO
        gx, gy = g_px * fx + g_tx * rz, g_py * fy + g_ty * rz
        gz = -(x * gx + y * gy + fx * (_dot(gp0, w[0]) - gj02 * tx) + fy * (_dot(gp1, w[1]) - gj12 * ty)) * rz
        g_mean = _apply_transposed(w, (gx, gy, gz))

        g_offsets[i, 0], g_offsets[i, 1] = g_px, g_py
        _store(g_means, i, g_mean)
        _store(g_velocities, i, (dt * g_mean[0], dt * g_mean[1], dt * g_mean[2]))
        g_opacities[i] = g_o * fade
        g_fade = g_o * opacities[i] * fade * u / durations[i]
        g_times[i], g_durations[i] = g_fade - _dot(g_mean, velocity), g_fade * u
        g_colors[i, 0], g_colors[i, 1], g_colors[i, 2] = rows[s, 6], rows[s, 7], rows[s, 8]
        if g_views.shape[0] > 0:
            _view_gradient(g_views, i, mean, (gx, gy, gz), _sum(j00, gp0, ZERO, gp0), _sum(j11, gp1, ZERO, gp1),
                           _sum(j02, gp0, j12, gp1))  # fmt: skip


@njit
def _view_gradient(out, i, mean, g_camera, g_row0, g_row1, g_row2):
    for k in range(3):
        out[i, k] = g_camera[0] * mean[k] + g_row0[k]
        out[i, 4 + k] = g_camera[1] * mean[k] + g_row1[k]
        out[i, 8 + k] = g_camera[2] * mean[k] + g_row2[k]
    out[i, 3], out[i, 7], out[i, 11] = g_camera
