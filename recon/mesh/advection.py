"""One mesh for a whole clip: its vertices ride on the Gaussians from frame to frame and are held to the surface.

Gaussians live for a few frames only, so a vertex has none of its own: in every step it takes the mean velocity of
those that are near and visible then, and hops from one to the next as they fade.  What drifts is brought back to the
surface fused at that frame, smoothly over the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from d2 import machine
from d2.recon.gaussians import Gaussians4D
from d2.recon.mesh import Mesh

FAINT = 0.05  # opacity from which a Gaussian carries
NEAREST = 12  # Gaussians that carry a vertex
SMOOTH_VELOCITY = 6  # rounds of averaging over the mesh
SUBSTEPS = 2  # from one frame to the next
# Towards the surface: rounds of averaging the way there, wide first, so that detail follows what lies around it.
HOLDS = (24, 12, 6, 3)
REACH = 0.06  # of the mesh's extent, farther than which a surface is taken for another part's
FACING = 0.3  # least cosine between the normals of a vertex and of the surface it is drawn to


class Field:
    """The velocity of the object anywhere near its Gaussians."""

    def __init__(self, gaussians: Gaussians4D) -> None:
        self._o3d: Any = machine.require("open3d", "mesh")
        self._gaussians = gaussians.map(lambda tensor: tensor.detach().cpu())
        self._velocities = self._gaussians.velocities.double().numpy()

    def at(self, points: np.ndarray, time: float) -> np.ndarray:  # [n, 3], 0..1 -> [n, 3] world per unit of time
        """The mean over the nearest visible Gaussians, those that are nearer and more opaque counting more."""
        moment = self._gaussians.at(time)
        opacities = moment.opacities.double().numpy()
        seen = np.nonzero(opacities >= min(FAINT, 0.5 * opacities.max()))[0]
        tensor = self._o3d.core.Tensor
        search = self._o3d.core.nns.NearestNeighborSearch(tensor(moment.means.double().numpy()[seen]))
        search.knn_index()
        index, squares = search.knn_search(tensor(np.ascontiguousarray(points, float)), min(NEAREST, len(seen)))
        index, squares = seen[index.numpy()], squares.numpy()
        weights = opacities[index] * np.exp(-squares / np.maximum(squares.mean(1, keepdims=True), 1e-12))
        return np.einsum("nk,nkc->nc", weights / weights.sum(1, keepdims=True), self._velocities[index])


class Around:
    """Averages over the edges of a mesh, whose every vertex is part of a triangle."""

    def __init__(self, triangles: np.ndarray) -> None:
        edges = np.unique(np.sort(triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)), axis=0)
        pairs = np.concatenate([edges, edges[:, ::-1]])
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        self._others, degrees = pairs[:, 1], np.bincount(pairs[:, 0])
        self._starts, self._degrees = np.cumsum(degrees) - degrees, degrees[:, None]

    def smooth(self, values: np.ndarray, rounds: int) -> np.ndarray:  # [V, C] -> [V, C]
        for _ in range(rounds):
            values = 0.5 * (values + np.add.reduceat(values[self._others], self._starts) / self._degrees)
        return values


def carry(
    gaussians: Gaussians4D,
    mesh: Mesh,
    start: int,  # the frame that `mesh` is of
    times: Sequence[float] | np.ndarray,  # [F] in 0..1
    surfaces: Sequence[Mesh] | None,  # [F] fused at each frame, that the vertices are held to; None: let them drift
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:  # F times [V, 3]
    """Where the vertices of `mesh` are at every frame, forwards and backwards from `start`.

    Raises SetupError without Open3D.
    """
    field, around = Field(gaussians), Around(mesh.triangles)
    places = {start: mesh.vertices}
    for step, end in ((1, len(times)), (-1, -1)):
        for k in range(start + step, end, step):
            moved = _ride(field, around, places[k - step], float(times[k - step]), float(times[k]))
            places[k] = moved if surfaces is None else _hold(around, mesh.triangles, moved, surfaces[k])
            progress(len(places), len(times))
    return [places[k] for k in range(len(times))]


def normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:  # [V, 3], [T, 3] -> [V, 3] unit
    """Outward, the mean of the triangles around a vertex by their areas."""
    a, b, c = (vertices[triangles[:, k]] for k in range(3))
    faces = np.cross(b - a, c - a)
    total = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(total, triangles[:, k], faces)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


def _ride(field: Field, around: Around, points: np.ndarray, begin: float, end: float) -> np.ndarray:
    """By the midpoint rule, velocities averaged over the mesh."""
    dt = (end - begin) / SUBSTEPS
    for t in begin + dt * np.arange(SUBSTEPS):
        half = points + 0.5 * dt * around.smooth(field.at(points, t), SMOOTH_VELOCITY)
        points = points + dt * around.smooth(field.at(half, t + 0.5 * dt), SMOOTH_VELOCITY)
    return points


def _hold(around: Around, triangles: np.ndarray, points: np.ndarray, surface: Mesh) -> np.ndarray:
    """Draws vertices to the nearest place of `surface` that faces the same way, and their neighbours along."""
    o3d: Any = machine.require("open3d", "mesh")
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(
        o3d.core.Tensor(np.ascontiguousarray(surface.vertices, np.float32)),
        o3d.core.Tensor(np.ascontiguousarray(surface.triangles, np.uint32)),
    )
    reach = REACH * float(np.ptp(points, axis=0).max())
    for rounds in HOLDS:
        found = scene.compute_closest_points(o3d.core.Tensor(np.ascontiguousarray(points, np.float32)))
        way = found["points"].numpy() - points
        facing = (found["primitive_normals"].numpy() * normals(points, triangles)).sum(1)
        sure = ((facing > FACING) & (np.linalg.norm(way, axis=1) < reach)).astype(float)[:, None]
        spread = around.smooth(np.concatenate([sure * way, sure], 1), rounds)
        points = points + spread[:, :3] / np.maximum(spread[:, 3:], 1e-3)
    return points
