"""The surface of 4D Gaussians at one moment: depth seen from all around, fused by Open3D (extra `mesh`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from d2 import machine
from d2.camera import Rig, viewmats
from d2.errors import InputError
from d2.recon import drawing
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.mesh import Mesh, MeshConfig
from d2.recon.raster import sh as spherical
from d2.recon.raster.depth import surface
from d2.recon.raster.reference import ALPHA_MIN

MARGIN = 1.05  # of the sphere that the cameras hold
PIXEL = 1.5  # voxels that a pixel of the virtual cameras is wide at the object's centre
TRUNCATION = 6.0  # voxels on each side of a surface that a depth speaks for
LEAST_VIEWS = 3.0  # that must have spoken for a voxel
HOLE = 10.0  # voxels across, up to which a hole is closed


def fuse(
    gaussians: Gaussians4D,
    time: float,  # 0..1
    settings: MeshConfig,
    box: tuple[np.ndarray, np.ndarray] | None = None,  # lowest and highest corner [3]; default: of this moment
) -> Mesh:
    """The surface at one moment, in full detail, by the signed distances of median depths (Curless and Levoy 1996).

    It lies about a voxel outside: the virtual cameras' pixels blur outlines as those of `rasterize` do.  Raises
    SetupError without Open3D and InputError where nothing is opaque.
    """
    o3d: Any = machine.require("open3d", "mesh")
    low, high = box or drawing.bounds(gaussians, [time])
    voxel = float((high - low).max()) / settings.voxels
    moment = _opaque(gaussians, time)
    rig, c2w = _cameras(low, high, PIXEL * voxel, settings.cameras)
    K, grid = torch.from_numpy(rig.K).float(), _Grid(o3d, voxel)
    for eye, view in zip(torch.from_numpy(c2w[:, :3, 3]).float(), torch.from_numpy(viewmats(c2w)).float(), strict=True):
        colors = spherical.evaluate(moment.sh_degree, moment.means - eye, moment.sh)
        solid = (moment.means, moment.quats, moment.scales, moment.opacities, colors)
        image, depth = surface(*solid, view, K, rig.width, rig.height)
        if depth.any():
            grid.add(depth, image.clip(0, 1), rig.K, view.double().numpy())
    if grid.empty:
        raise InputError("there is no surface to mesh: nothing is opaque at this moment")
    return _tidy(grid.surface(), settings)


def _opaque(gaussians: Gaussians4D, time: float) -> Gaussians3D:
    """What can be seen at a moment, on the CPU."""
    moment = gaussians.map(lambda tensor: tensor.detach().cpu().float()).at(time)
    seen = moment.opacities >= ALPHA_MIN
    return Gaussians3D(*(tensor[seen] for tensor in vars(moment).values()))


def reduced(mesh: Mesh, triangles: int) -> Mesh:
    """The same surface with at most so many triangles (Garland and Heckbert 1997); 0: as it is."""
    if not 0 < triangles < len(mesh.triangles):
        return mesh
    o3d: Any = machine.require("open3d", "mesh")
    found = _legacy(o3d, mesh).simplify_quadric_decimation(triangles)
    found.remove_unreferenced_vertices()
    return _mesh(found)


def _cameras(low: np.ndarray, high: np.ndarray, pixel: float, count: int) -> tuple[Rig, np.ndarray]:
    """Intrinsics, and `count` cameras [count, 4, 4] spread evenly over a sphere around the box; `pixel` is world."""
    center, radius = 0.5 * (low + high), 0.5 * MARGIN * float(np.linalg.norm(high - low))
    k = np.arange(count)
    azimuth, elevation = k * math.pi * (3 - math.sqrt(5)), np.arcsin(1 - (2 * k + 1) / count)
    size = math.ceil(2 * radius / pixel)
    rig = dataclasses.replace(drawing.orbit_rig(radius, azimuth, size, size), elevation=elevation)
    c2w = rig.c2w
    c2w[:, :3, 3] += center
    return rig, c2w


class _Grid:
    """Open3D's sparse grid of truncated signed distances."""

    def __init__(self, o3d: Any, voxel: float) -> None:
        f32 = o3d.core.float32
        self._o3d, self._voxel, self.empty = o3d, voxel, True
        self._grid = o3d.t.geometry.VoxelBlockGrid(
            ("tsdf", "weight", "color"), (f32, f32, f32), ((1), (1), (3)), voxel, 8, 20_000
        )

    def add(self, depth: np.ndarray, color: np.ndarray, K: np.ndarray, viewmat: np.ndarray) -> None:
        tensor, image = self._o3d.core.Tensor, self._o3d.t.geometry.Image
        camera = tensor(K), tensor(viewmat), 1.0, 1.01 * float(depth.max()), TRUNCATION
        depths, colors = image(tensor(depth)), image(tensor(np.ascontiguousarray(color, np.float32)))
        blocks = self._grid.compute_unique_block_coordinates(depths, *camera)
        self.empty = False
        self._grid.integrate(blocks, depths, colors, *camera)

    def surface(self) -> Any:
        """Open3D's legacy mesh, small holes closed."""
        mesh = self._grid.extract_triangle_mesh(LEAST_VIEWS)
        before, mesh = mesh.to_legacy(), mesh.fill_holes(HOLE * self._voxel).to_legacy()
        triangles, normals = np.array(mesh.triangles), np.asarray(mesh.vertex_normals)
        a, b, c = (np.asarray(mesh.vertices)[triangles[:, k]] for k in range(3))
        inward = (np.cross(b - a, c - a) * normals[triangles].sum(1)).sum(1) < 0
        wrong = inward & ~_rows_in(triangles, np.asarray(before.triangles))  # what closes a hole faces either way
        triangles[wrong] = triangles[wrong][:, ::-1]
        mesh.triangles = self._o3d.utility.Vector3iVector(triangles)
        return mesh


def _rows_in(rows: np.ndarray, others: np.ndarray) -> np.ndarray:  # [n, 3], [m, 3] of indices -> bool [n]
    """Which triangles have the corners, in any order, of one of the others."""
    both = np.sort(np.concatenate([rows, others]), axis=1)
    _, number = np.unique(both, axis=0, return_inverse=True)
    return np.isin(number[: len(rows)], number[len(rows) :])


def _tidy(mesh: Any, settings: MeshConfig) -> Mesh:
    """Without floaters and cavities, and smoothed."""
    part, sizes, _ = (np.asarray(values) for values in mesh.cluster_connected_triangles())
    if len(sizes) == 0:
        raise InputError("there is no surface to mesh: it is smaller than a voxel or seen by too few cameras")
    a, b, c = (np.asarray(mesh.vertices)[np.asarray(mesh.triangles)[:, k]] for k in range(3))
    volumes = np.bincount(part, (np.cross(a, b) * c).sum(1))  # negative for the wall of a cavity, which nothing shows
    small = sizes < settings.least_part * sizes.max()
    mesh.remove_triangles_by_mask((small | (volumes < 0))[part])
    mesh.remove_unreferenced_vertices()
    return _mesh(mesh.filter_smooth_taubin(settings.smoothing))


def _mesh(legacy: Any) -> Mesh:
    vertices = np.asarray(legacy.vertices)
    colors = np.asarray(legacy.vertex_colors).clip(0, 1)
    return Mesh(vertices, np.asarray(legacy.triangles, np.int32), colors, np.zeros_like(vertices))


def _legacy(o3d: Any, mesh: Mesh) -> Any:
    vector, triples = o3d.utility.Vector3dVector, o3d.utility.Vector3iVector
    legacy = o3d.geometry.TriangleMesh(vector(mesh.vertices), triples(mesh.triangles))
    legacy.vertex_colors = vector(mesh.colors)
    return legacy
