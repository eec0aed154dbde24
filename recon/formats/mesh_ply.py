"""PLY meshes: positions, colours in bytes and triangles, binary."""

from __future__ import annotations

import numpy as np

from d2.recon.mesh import Mesh

_HEADER = """ply
format binary_little_endian 1.0
element vertex {vertices}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face {faces}
property list uchar int vertex_indices
end_header
"""


def encode(mesh: Mesh) -> bytes:
    """The bytes of one mesh; colours are display-referred."""
    vertices = np.empty(len(mesh.vertices), [("place", "<f4", 3), ("color", "u1", 3)])
    vertices["place"], vertices["color"] = mesh.vertices, (mesh.colors.clip(0, 1) * 255).round()
    faces = np.empty(len(mesh.triangles), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.triangles
    return _HEADER.format(vertices=len(vertices), faces=len(faces)).encode() + vertices.tobytes() + faces.tobytes()
