"""Ray casting of ellipsoids, capsules and boxes in numba, one z-buffer a picture.

Everything is computed in the camera's OpenCV axes (x right, y down, z forward), where the ray through pixel (x, y) is
(a, b, 1) and its parameter at a hit is the depth.  Pictures are anti-aliased by supersampling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np

ELLIPSOID, CAPSULE, BOX = 0, 1, 2
PLAIN, STRIPES, PATCH, TWO_TONE = 0, 1, 2, 3
FAR = 1e9  # depth of a ray that hits nothing
LIGHT = (-0.36, -0.56, 0.745)  # unit vector towards the lamp in world axes: left, in front and above
AMBIENT, SKY, LAMP = 0.78, 0.09, 0.29  # from everywhere, from above, from the lamp
LEAST, MOST = 0.55, 1.10  # bounds of the brightness, so that no side is black and none burns out


class Parts(NamedTuple):
    """The solids of a toy; each hangs unturned in the frame of a bone."""

    kinds: np.ndarray  # [P] int64, ELLIPSOID, CAPSULE or BOX
    bones: np.ndarray  # [P] int64
    centres: np.ndarray  # [P, 3] in the bone's frame
    halves: np.ndarray  # [P, 3] half axes; of a capsule: radius, radius, half its straight length along z
    patterns: np.ndarray  # [P] int64
    extents: np.ndarray  # [P] bands of STRIPES, radius of a PATCH, border of TWO_TONE; parts reach from -1 to 1
    inks: np.ndarray  # [P, 2, 3] the colour and the pattern's colour, 0..1


def draw(
    parts: Parts,
    turns: np.ndarray,  # [N, B, 3, 3] bone to world
    origins: np.ndarray,  # [N, B, 3] world
    viewmats: np.ndarray,  # [N, 4, 4] world to camera, OpenCV
    focal: float,  # pixels, for pictures of `size`
    size: int,
    samples: int,  # rays along each side of a pixel
) -> np.ndarray:  # [N, 4, size, size] float32
    """Pictures with colours on white and coverage as alpha, all in 0..1; one thread, without the GIL."""
    pictures = np.empty((len(turns), 4, size, size), np.float32)
    _draw(*parts, turns, origins, viewmats, focal * samples, samples, pictures)
    return pictures


@numba.njit(cache=True, nogil=True, fastmath=True)
def _draw(kinds, bones, centres, halves, patterns, extents, inks, turns, origins, viewmats, focal, samples, pictures):
    """`draw` without names; first what every ray sees, then its colour, so that hidden solids cost no shading."""
    rays = pictures.shape[2] * samples
    P = len(kinds)
    depth = np.empty((rays, rays), np.float32)
    seen = np.empty((rays, rays), np.int16)
    eye = np.empty((P, 3))  # the camera in the part's frame
    axes = np.empty((P, 3, 3))  # part to camera
    for n in range(len(pictures)):
        depth[:] = FAR
        seen[:] = -1
        view = viewmats[n]
        for i in range(P):
            centre = view[:3, 3].copy()
            _place(turns[n, bones[i]], origins[n, bones[i]], centres[i], view, axes[i], centre)
            for k in range(3):
                eye[i, k] = -(axes[i, 0, k] * centre[0] + axes[i, 1, k] * centre[1] + axes[i, 2, k] * centre[2])
            _cast(i, kinds[i], halves[i], axes[i], eye[i], centre, focal, depth, seen)
        _shade(
            kinds, bones, halves, patterns, extents, inks, turns[n], axes, eye, focal, samples, depth, seen, pictures[n]
        )


@numba.njit(cache=True, nogil=True, fastmath=True)
def _place(turn, origin, offset, view, axes, centre):
    """Fills `axes` (part to camera) and adds the part's place to `centre`, which holds the camera's translation."""
    for r in range(3):
        for k in range(3):
            axes[r, k] = view[r, 0] * turn[0, k] + view[r, 1] * turn[1, k] + view[r, 2] * turn[2, k]
        for k in range(3):
            centre[r] += axes[r, k] * offset[k] + view[r, k] * origin[k]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _cast(i, kind, half, axes, eye, centre, focal, depth, seen):
    """Writes part `i` into the z-buffer, within the rectangle that its bounding box covers."""
    rays = len(depth)
    rx, ry, rz = _reach(kind, half, axes[0]), _reach(kind, half, axes[1]), _reach(kind, half, axes[2])
    near, far = centre[2] - rz, centre[2] + rz
    if near < 1e-3:
        return  # behind the camera or around it
    x0, x1 = _span(centre[0], rx, near, far, focal, rays)
    y0, y1 = _span(centre[1], ry, near, far, focal, rays)
    step, middle = 1 / focal, 0.5 * rays - 0.5
    ox, oy, oz = eye[0], eye[1], eye[2]
    sx, sy, sz = half[0], half[1], half[2]
    for y in range(y0, y1):
        b = (y - middle) * step
        for x in range(x0, x1):
            a = (x - middle) * step
            dx = a * axes[0, 0] + b * axes[1, 0] + axes[2, 0]
            dy = a * axes[0, 1] + b * axes[1, 1] + axes[2, 1]
            dz = a * axes[0, 2] + b * axes[1, 2] + axes[2, 2]
            if kind == ELLIPSOID:
                t = _hit_ball(ox / sx, oy / sy, oz / sz, dx / sx, dy / sy, dz / sz, 1.0)
            elif kind == CAPSULE:
                t = _hit_capsule(ox, oy, oz, dx, dy, dz, sx, sz)
            else:
                t = _hit_box(ox, oy, oz, dx, dy, dz, sx, sy, sz)
            if t < depth[y, x]:
                depth[y, x] = t
                seen[y, x] = i


@numba.njit(cache=True, nogil=True, fastmath=True)
def _reach(kind, half, axis):
    """How far a solid reaches from its centre along a unit vector given in its own frame."""
    x, y, z = abs(axis[0]) * half[0], abs(axis[1]) * half[1], abs(axis[2]) * half[2]
    if kind == ELLIPSOID:
        return math.sqrt(x * x + y * y + z * z)
    return z + half[0] if kind == CAPSULE else x + y + z


@numba.njit(cache=True, nogil=True, fastmath=True)
def _span(centre, reach, near, far, focal, rays):
    """First and one past the last ray that can meet something at centre ± reach between two depths."""
    low, high = centre - reach, centre + reach
    first = focal * min(low / near, low / far) + 0.5 * rays
    last = focal * max(high / near, high / far) + 0.5 * rays
    return max(0, math.floor(first)), min(rays, math.ceil(last))


@numba.njit(cache=True, nogil=True, fastmath=True)
def _hit_ball(ox, oy, oz, dx, dy, dz, radius):
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    d = b * b - a * (ox * ox + oy * oy + oz * oz - radius * radius)
    return (-b - math.sqrt(d)) / a if d > 0 else FAR


@numba.njit(cache=True, nogil=True, fastmath=True)
def _hit_capsule(ox, oy, oz, dx, dy, dz, radius, straight):
    a = dx * dx + dy * dy
    b = ox * dx + oy * dy
    d = b * b - a * (ox * ox + oy * oy - radius * radius)
    if d <= 0:
        return FAR  # the caps lie within the endless cylinder
    t = (-b - math.sqrt(d)) / max(a, 1e-12)
    z = oz + t * dz
    if abs(z) <= straight:
        return t
    return _hit_ball(ox, oy, oz - math.copysign(straight, z), dx, dy, dz, radius)


@numba.njit(cache=True, nogil=True, fastmath=True)
def _hit_box(ox, oy, oz, dx, dy, dz, sx, sy, sz):
    ix, iy, iz = _inverse(dx), _inverse(dy), _inverse(dz)
    mx, my, mz = -ox * ix, -oy * iy, -oz * iz
    rx, ry, rz = sx * abs(ix), sy * abs(iy), sz * abs(iz)
    enter = max(mx - rx, my - ry, mz - rz)
    leave = min(mx + rx, my + ry, mz + rz)
    return enter if enter < leave else FAR


@numba.njit(cache=True, nogil=True, fastmath=True)
def _inverse(x):
    return 1 / x if abs(x) > 1e-9 else 1e9


@numba.njit(cache=True, nogil=True, fastmath=True)
def _shade(kinds, bones, halves, patterns, extents, inks, turns, axes, eye, focal, samples, depth, seen, picture):
    """Colours every ray by what it met and averages the rays of a pixel on white."""
    size = picture.shape[1]
    step, middle, share = 1 / focal, 0.5 * size * samples - 0.5, 1 / (samples * samples)
    for y in range(size):
        for x in range(size):
            red, green, blue, alpha = 0.0, 0.0, 0.0, 0.0
            for v in range(y * samples, (y + 1) * samples):
                for u in range(x * samples, (x + 1) * samples):
                    i = seen[v, u]
                    if i < 0:
                        continue
                    t, a, b, m = depth[v, u], (u - middle) * step, (v - middle) * step, axes[i]
                    px = eye[i, 0] + t * (a * m[0, 0] + b * m[1, 0] + m[2, 0])
                    py = eye[i, 1] + t * (a * m[0, 1] + b * m[1, 1] + m[2, 1])
                    pz = eye[i, 2] + t * (a * m[0, 2] + b * m[1, 2] + m[2, 2])
                    bright = _brightness(kinds[i], halves[i], turns[bones[i]], px, py, pz)
                    ink = inks[i, _pattern(kinds[i], halves[i], patterns[i], extents[i], px, py, pz)]
                    red += min(1.0, ink[0] * bright)
                    green += min(1.0, ink[1] * bright)
                    blue += min(1.0, ink[2] * bright)
                    alpha += 1
            white = 1 - alpha * share
            picture[0, y, x] = red * share + white
            picture[1, y, x] = green * share + white
            picture[2, y, x] = blue * share + white
            picture[3, y, x] = alpha * share


@numba.njit(cache=True, nogil=True, fastmath=True)
def _brightness(kind, half, turn, px, py, pz):
    """Ambient light, light from above and a lamp that reaches round the edge, by the normal at a point of a solid."""
    nx, ny, nz = px, py, pz
    if kind == ELLIPSOID:
        nx, ny, nz = px / half[0] ** 2, py / half[1] ** 2, pz / half[2] ** 2
    elif kind == CAPSULE:
        nz = pz - min(max(pz, -half[2]), half[2])
    else:
        qx, qy, qz = abs(px) / half[0], abs(py) / half[1], abs(pz) / half[2]
        if qx > qy and qx > qz:
            ny, nz = 0.0, 0.0
        elif qy > qz:
            nx, nz = 0.0, 0.0
        else:
            nx, ny = 0.0, 0.0
    up = turn[2, 0] * nx + turn[2, 1] * ny + turn[2, 2] * nz
    lit = (
        LIGHT[0] * (turn[0, 0] * nx + turn[0, 1] * ny + turn[0, 2] * nz)
        + LIGHT[1] * (turn[1, 0] * nx + turn[1, 1] * ny + turn[1, 2] * nz)
        + LIGHT[2] * up
    )
    inverse = 1 / math.sqrt(nx * nx + ny * ny + nz * nz + 1e-18)
    return min(max(AMBIENT + inverse * (SKY * up + LAMP * lit), LEAST), MOST)


@numba.njit(cache=True, nogil=True, fastmath=True)
def _pattern(kind, half, pattern, extent, px, py, pz):
    """Which of its two inks a part has at a point; in its own frame, so that the pattern moves with it."""
    if pattern == PLAIN:
        return 0
    z = pz / (half[2] + half[0] if kind == CAPSULE else half[2])
    if pattern == STRIPES:
        return int((z + 1) * 0.5 * extent) & 1
    if pattern == TWO_TONE:
        return 1 if z < extent else 0
    x = px / half[0]
    return 1 if py < 0 and x * x + z * z < extent * extent else 0
