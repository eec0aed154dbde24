"""OBJ with a colour after each position, as Blender, MeshLab, ZBrush and Houdini read it."""

from __future__ import annotations

from d2.recon.mesh import Mesh


def encode(mesh: Mesh) -> bytes:
    """The text of one mesh; colours are display-referred, 0 to 1."""
    x = [f"v {a:.6g} {b:.6g} {c:.6g}" for a, b, c in mesh.vertices.tolist()]
    rgb = [f"{r:.4f} {g:.4f} {b:.4f}" for r, g, b in mesh.colors.tolist()]
    faces = [f"f {a} {b} {c}" for a, b, c in (mesh.triangles + 1).tolist()]
    return "\n".join(["# d2", *map(" ".join, zip(x, rgb, strict=True)), *faces, ""]).encode()
