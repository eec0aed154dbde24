"""A static 3D asset as input: placed in the middle of the orbit and drawn from every camera of it.

The pictures stand for the view model's samples, and the one at azimuth 0 for the user's picture.  Meshes are read and
ray-cast here, by Open3D, without a display; whoever can draw something else hands in an `Asset` of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from d2 import fileio
from d2.camera import TO_Y_UP, Rig
from d2.errors import InputError
from d2.machine import require

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".fbx")
Z_UP_SUFFIXES = (".ply", ".stl", ".off")  # formats of scanners and printers; the others' custom is y up
MAX_MESH = 1 << 30  # bytes of a file
MAX_TRIANGLES = 20_000_000
SAMPLES = 3  # rays along each side of a pixel
GREY = 0.8  # a mesh without material
LIGHT = np.array([-0.36, -0.56, 0.745])  # unit vector towards the lamp, world axes
AMBIENT, LAMP = 0.72, 0.36  # the share of the colour from everywhere, and from the lamp
BISECTIONS = 40

Up = Literal["auto", "y", "z"]


class Asset(Protocol):
    """Something solid in axes of its own, that can be seen from any camera."""

    path: Path
    up: Literal["y", "z"]  # the custom of its format: y up, front towards +z; or z up, front towards -y

    @property
    def points(self) -> np.ndarray:
        """[N, 3] points that tell how far it reaches."""
        ...

    def draw(self, c2w: np.ndarray, K: np.ndarray, size: int, turn: np.ndarray) -> np.ndarray:
        """[size, size, 4] uint8, straight alpha, from an OpenGL camera [4, 4]; `turn` [3, 3] takes it to the world."""
        ...


def views(
    asset: Asset,
    rig: Rig,
    ratio: float | None = 0.9,  # share of the square that the asset takes up where it looks largest; None: 1
    up: Up = "auto",
    turn_deg: float = 0.0,  # about the vertical, counter-clockwise from above
) -> Iterator[Image.Image]:
    """Yields the asset as each camera of `rig` sees it, RGBA. Raises InputError for one without extent."""
    turn = _turn(asset.up if up == "auto" else up, turn_deg)
    points = np.asarray(asset.points, float)
    if len(points) == 0 or not np.isfinite(points).all() or not np.ptp(points, axis=0).max() > 0:
        raise InputError(f"{fileio.quoted(asset.path)} has no extent: nothing to draw")
    points = points @ turn.T
    centre = (points.min(0) + points.max(0)) / 2
    scale = _scale(points - centre, rig, ratio or 1.0)
    cameras = rig.c2w
    cameras[:, :3, 3] = cameras[:, :3, 3] / scale + centre
    cameras[:, :3] = turn.T @ cameras[:, :3]  # from the world to the asset's axes
    for c2w in cameras:
        yield Image.fromarray(asset.draw(c2w, rig.K, rig.width, turn), "RGBA")


def _turn(up: str, degrees: float) -> np.ndarray:  # [3, 3] asset to world
    a = np.radians(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    return about_z @ (TO_Y_UP.T if up == "y" else np.eye(3))


def _scale(points: np.ndarray, rig: Rig, ratio: float) -> float:
    """The factor at which the points, seen by every camera, just fill `ratio` of the picture."""
    viewmats = rig.viewmats
    corners = _hull(points)
    low, high = 0.0, 0.99 * rig.radius / np.linalg.norm(corners, axis=1).max()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        seen = np.einsum("vij,nj->vni", viewmats[:, :3, :3], middle * corners) + viewmats[:, None, :3, 3]
        reach = np.abs(seen[..., :2] / seen[..., 2:]).max() * rig.focal / (rig.width / 2)
        low, high = (middle, high) if reach < ratio else (low, middle)
    return low


def _hull(points: np.ndarray) -> np.ndarray:
    """Points that lie outermost in some direction: the extent of all, at a fraction of the cost."""
    side = np.linspace(-1, 1, 17)
    directions = np.stack(np.meshgrid(side, side, side), -1).reshape(-1, 3)
    directions = directions[np.abs(directions).max(1) == 1]
    return points[np.unique(np.concatenate([(points @ part.T).argmax(0) for part in np.array_split(directions, 16)]))]


class Mesh:
    """Triangles with the colours of their texture, vertices or material. Raises InputError for what is none."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        fileio.read_bytes(path, MAX_MESH)  # says what is wrong with a file that cannot be read
        self.path = path
        self.up: Literal["y", "z"] = "z" if path.suffix.lower() in Z_UP_SUFFIXES else "y"
        o3d: Any = require("open3d", "mesh")
        with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
            model = o3d.io.read_triangle_model(str(path))
        parts = [part for part in model.meshes if len(part.mesh.triangles)]
        if not parts:
            raise InputError(f"{fileio.quoted(path)} holds no triangles; accepted: meshes and 3D Gaussian PLY files")
        if sum(len(part.mesh.triangles) for part in parts) > MAX_TRIANGLES:
            raise InputError(f"{fileio.quoted(path)} has more than {MAX_TRIANGLES:,} triangles; simplify it first")
        self._scene = o3d.t.geometry.RaycastingScene()
        self._tensor = o3d.core.Tensor
        self._parts = {}
        for part in parts:
            if not part.mesh.has_vertex_normals():
                part.mesh.compute_vertex_normals()
            number = self._scene.add_triangles(o3d.t.geometry.TriangleMesh.from_legacy(part.mesh))
            self._parts[number] = _Part(part.mesh, model.materials[part.material_idx])

    @property
    def points(self) -> np.ndarray:
        return np.concatenate([part.vertices for part in self._parts.values()])

    def draw(self, c2w: np.ndarray, K: np.ndarray, size: int, turn: np.ndarray) -> np.ndarray:
        side = size * SAMPLES
        x = (np.arange(side) + 0.5) / SAMPLES
        plane = np.stack(np.broadcast_arrays((x[None] - K[0, 2]) / K[0, 0], (K[1, 2] - x[:, None]) / K[1, 1], -1.0), -1)
        directions = plane @ c2w[:3, :3].T
        origins = np.broadcast_to(c2w[:3, 3], directions.shape)
        rays = np.concatenate([origins, directions], -1).astype(np.float32)
        seen = {key: value.numpy() for key, value in self._scene.cast_rays(self._tensor(rays)).items()}
        picture = np.zeros((side, side, 4), np.float32)
        for number, part in self._parts.items():
            hit = seen["geometry_ids"] == number
            corners, uv = seen["primitive_ids"][hit], seen["primitive_uvs"][hit]
            picture[hit] = part.colours(corners, np.c_[1 - uv.sum(1), uv], directions[hit], turn)
        picture[..., :3] *= picture[..., 3:]
        picture = picture.reshape(size, SAMPLES, size, SAMPLES, 4).mean((1, 3))
        alpha = np.maximum(picture[..., 3:], 1e-6)
        straight = np.concatenate([picture[..., :3] / alpha, picture[..., 3:]], -1)
        return (straight.clip(0, 1) * 255 + 0.5).astype(np.uint8)


class _Part:
    """One mesh of a file, and its material."""

    def __init__(self, mesh: Any, material: Any) -> None:
        self.vertices = np.asarray(mesh.vertices)
        self._triangles = np.asarray(mesh.triangles)
        self._normals = np.asarray(mesh.vertex_normals)
        self._inks = np.asarray(mesh.vertex_colors) if mesh.has_vertex_colors() else None
        self._uvs = np.asarray(mesh.triangle_uvs).reshape(-1, 3, 2) if mesh.has_triangle_uvs() else None
        texture = np.asarray(material.albedo_img) if material.albedo_img is not None else np.empty(0)
        self._texture = texture if texture.ndim == 3 and self._uvs is not None else None
        plain = self._texture is None and self._inks is None and tuple(material.base_color[:3]) == (1, 1, 1)
        self._base = np.array([GREY] * 3 + [1.0] if plain else material.base_color, float)

    def colours(
        self,
        triangles: np.ndarray,  # [n]
        weights: np.ndarray,  # [n, 3] barycentric
        directions: np.ndarray,  # [n, 3] of the rays
        turn: np.ndarray,  # [3, 3]
    ) -> np.ndarray:  # [n, 4]
        """Albedo under one lamp, the same on both sides of a surface; display-referred."""
        corners = self._triangles[triangles]
        rgba = np.tile(self._base, (len(triangles), 1))
        if self._texture is not None and self._uvs is not None:
            u, v = (weights[..., None] * self._uvs[triangles]).sum(1).T
            texels = self._sample(np.stack([u, 1 - v], 1)) / 255  # v points up, rows go down
            rgba[:, : texels.shape[1]] *= texels
        if self._inks is not None:
            rgba[:, :3] *= (weights[..., None] * self._inks[corners]).sum(1)
        normals = (weights[..., None] * self._normals[corners]).sum(1)
        normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        normals = normals * np.where((normals * directions).sum(1, keepdims=True) > 0, -1, 1)
        rgba[:, :3] *= AMBIENT + LAMP * np.maximum(normals @ (turn.T @ LIGHT), 0)[:, None]
        return rgba.clip(0, 1)

    def _sample(self, uv: np.ndarray) -> np.ndarray:  # [n, 2] -> [n, C]
        """The texture, repeated beyond its edges and interpolated."""
        texture = self._texture
        assert texture is not None
        height, width = len(texture), len(texture[0])
        at = uv * (width, height) - 0.5
        low = np.floor(at).astype(int)
        share = at - low
        total = 0.0
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            weight = (share[:, 0] if dx else 1 - share[:, 0]) * (share[:, 1] if dy else 1 - share[:, 1])
            total = total + weight[:, None] * texture[(low[:, 1] + dy) % height, (low[:, 0] + dx) % width]
        return np.asarray(total)
