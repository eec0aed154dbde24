"""Proxy geometry: the surface of 4D Gaussians as triangles, fused at every frame or carried through the clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d2.config import config, option


@config
class MeshConfig:
    """Every knob of the mesh exports."""

    voxels: int = option(192, "voxels along the longest side of the object", ge=16, le=1024)
    cameras: int = option(64, "virtual cameras around the object", ge=12, le=1000)
    smoothing: int = option(12, "rounds of smoothing that keep the volume", ge=0, le=1000)
    least_part: float = option(0.05, "a part with fewer triangles than this share of the largest goes", ge=0, le=1)
    triangles: int = option(40_000, "triangles that a written mesh is reduced to; 0 = as fused", ge=0, le=10_000_000)
    moment: float | None = option(
        None,
        "time, 0 to 1, of the frame whose mesh is carried; default: the frame with the largest surface",
        ge=0,
        le=1,
    )


@dataclass(frozen=True)
class Mesh:
    """Triangles at one moment, in the axes of the Gaussians they came from."""

    vertices: np.ndarray  # [V, 3]
    triangles: np.ndarray  # [T, 3] int32, counter-clockwise from outside
    colors: np.ndarray  # [V, 3] in 0..1, display-referred
    velocities: np.ndarray  # [V, 3] a second of the clip, or zero while unknown
