"""Orbit cameras and intrinsics; the only file where axes flip.

World: +z up, object at the origin, front towards -y.  c2w is OpenGL (x right, y up, z back), as in
nerfstudio and Blender; viewmats are OpenCV (x right, y down, z forward) world to camera, as gsplat takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
DEFAULT_FOV_DEG = 33.8  # SV3D's reported horizontal field of view
DEFAULT_RADIUS = 3.7  # scene units; a gauge: nothing in the pictures fixes it


@dataclass(frozen=True)
class Rig:
    """Orbit cameras that look at the origin; view V-1 is the input view, at azimuth 0."""

    azimuth: np.ndarray  # [V] rad, from -y towards +x
    elevation: np.ndarray  # [V] rad above the horizon
    radius: float  # world
    fov: float  # rad, horizontal
    width: int
    height: int

    @property
    def c2w(self) -> np.ndarray:
        """[V, 4, 4] camera to world, OpenGL."""
        return look_at_origin(orbit_positions(self.azimuth, self.elevation, self.radius))

    @property
    def viewmats(self) -> np.ndarray:
        """[V, 4, 4] world to camera, OpenCV."""
        return viewmats(self.c2w)

    @property
    def focal(self) -> float:
        """Focal length in pixels, the same along x and y."""
        return focal_length(self.fov, self.width)

    @property
    def K(self) -> np.ndarray:
        """[3, 3] intrinsics in pixels; the principal point is the centre."""
        return intrinsics(self.focal, self.focal, self.width / 2, self.height / 2)


def orbit(
    views: int,
    elevation_deg: float = 10.0,
    radius: float = DEFAULT_RADIUS,
    fov_deg: float = DEFAULT_FOV_DEG,
    width: int = 576,
    height: int = 576,
    clockwise: bool = False,
) -> Rig:
    """SV3D's orbit: view v at azimuth 2π(v + 1)/V, so that the last one is the input view."""
    azimuth = 2 * np.pi * np.arange(1, views + 1) / views % (2 * np.pi)
    return Rig(
        azimuth=-azimuth % (2 * np.pi) if clockwise else azimuth,
        elevation=np.full(views, math.radians(elevation_deg)),
        radius=radius,
        fov=math.radians(fov_deg),
        width=width,
        height=height,
    )


def orbit_positions(azimuth: np.ndarray, elevation: np.ndarray, radius: float) -> np.ndarray:
    """Camera centres [V, 3]: radius (sin az cos el, -cos az cos el, sin el)."""
    az, el = np.broadcast_arrays(np.asarray(azimuth, float), np.asarray(elevation, float))
    return radius * np.stack([np.sin(az) * np.cos(el), -np.cos(az) * np.cos(el), np.sin(el)], -1)


def look_at_origin(positions: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """c2w [V, 4, 4], OpenGL, of cameras at `positions` [V, 3] that look at `target` [3] with +z up."""
    back = positions - (0 if target is None else target)
    back = back / np.linalg.norm(back, axis=-1, keepdims=True)
    straight = np.abs(back[:, 2:]) > 1 - 1e-9  # looking along z, "up" is +y
    right = np.cross(np.where(straight, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]), back)
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    c2w = np.tile(np.eye(4), (len(positions), 1, 1))
    c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2], c2w[:, :3, 3] = right, np.cross(back, right), back, positions
    return c2w


def viewmats(c2w: np.ndarray) -> np.ndarray:
    """World to camera in OpenCV axes from camera to world in OpenGL axes, [..., 4, 4] both."""
    R, t = c2w[..., :3, :3], c2w[..., :3, 3]
    w2c = np.zeros_like(c2w, dtype=float)
    w2c[..., :3, :3] = np.swapaxes(R, -1, -2)
    w2c[..., :3, 3] = -np.einsum("...ji,...j->...i", R, t)
    w2c[..., 3, 3] = 1
    return OPENGL_TO_OPENCV @ w2c


def from_viewmats(w2c: np.ndarray) -> np.ndarray:
    """The inverse of `viewmats`: OpenGL camera to world from OpenCV world to camera, [..., 4, 4] both."""
    R, t = w2c[..., :3, :3], w2c[..., :3, 3]
    c2w = np.zeros_like(w2c, dtype=float)
    c2w[..., :3, :3] = np.swapaxes(R, -1, -2)
    c2w[..., :3, 3] = -np.einsum("...ji,...j->...i", R, t)
    c2w[..., 3, 3] = 1
    return c2w @ OPENGL_TO_OPENCV


def upright(
    c2w: np.ndarray,  # [n, 4, 4] OpenGL
    radius: float = DEFAULT_RADIUS,  # world, median distance of the cameras that comes out
) -> tuple[np.ndarray, np.ndarray]:  # [n, 4, 4], and [4, 4]: p' = S p with S = scale [R | t]
    """The cameras of a scene in any axes, turned, moved and scaled into our world.

    The origin becomes the point nearest to all optical axes, +z the mean of the cameras' up, and the first camera
    stands over -y.  Cameras that look the same way share no such point: then it lies in front of their mean.
    """
    centres, axes, ups = c2w[:, :3, 3], -c2w[:, :3, 2], c2w[:, :3, 1]
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    ridge = 1e-3 * len(c2w)
    spread = max(float(np.linalg.norm(centres - centres.mean(0), axis=1).mean()), 1e-9)
    usual = centres.mean(0) + spread * axes.mean(0)
    total = (across @ centres[:, :, None]).sum(0)[:, 0]
    centre = np.linalg.solve(across.sum(0) + ridge * np.eye(3), total + ridge * usual)
    z = ups.mean(0) / max(float(np.linalg.norm(ups.mean(0))), 1e-9)
    front = centres[0] - centre
    y = -(front - front @ z * z)
    if np.linalg.norm(y) < 1e-6 * np.linalg.norm(front) or np.linalg.norm(z) < 0.5:  # seen from straight above
        z, y = ups[0], axes[0] - axes[0] @ ups[0] * ups[0]
    y = y / np.linalg.norm(y)
    R = np.stack([np.cross(y, z), y, z])
    scale = radius / max(float(np.median(np.linalg.norm(centres - centre, axis=1))), 1e-9)
    S = np.eye(4)
    S[:3, :3], S[:3, 3] = scale * R, -scale * R @ centre
    moved = c2w.copy()
    moved[:, :3, :3] = R @ c2w[:, :3, :3]
    moved[:, :3, 3] = centres @ S[:3, :3].T + S[:3, 3]
    return moved, S


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """K [3, 3] in pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], float)


def focal_length(fov: float, size: int) -> float:
    """Focal length in pixels of a field of view (rad) across `size` pixels."""
    return 0.5 * size / math.tan(0.5 * fov)


# Rotations that take our world (z up, front on -y) to what other tools expect, applied as p' = A p.
TO_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # right, up, towards the viewer ("RUB")
TO_RDF = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # right, down, forward: the custom of 3DGS PLY
