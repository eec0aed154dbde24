"""Meshes as an export of a clip: one mesh that is carried through it, or one fused for every frame."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d2 import fileio, machine
from d2.camera import TO_Y_UP
from d2.recon import drawing
from d2.recon.formats import alembic, mesh_glb, mesh_ply, mesh_usd, obj, sequence, usd
from d2.recon.mesh import Mesh, advection, fusion

if TYPE_CHECKING:
    from d2.recon.exports import Clip

# mesh-…: the same triangles in every frame.  fused-…: each frame has its own.
KINDS = {"mesh": ("usd", "glb", "abc", "obj", "ply"), "fused": ("usd", "obj", "ply")}
FORMATS = tuple(f"{kind}-{suffix}" for kind, suffixes in KINDS.items() for suffix in suffixes)
SEQUENCES = tuple(what for what in FORMATS if what.endswith(("-obj", "-ply")))
BYTES_A_TRIANGLE = {"obj": 45, "ply": 21, "usd": 14, "glb": 6, "abc": 14}  # and frame, about


def file_name(what: str, clip: Clip) -> str:
    """Where a mesh format goes within the export folder."""
    kind, suffix = what.split("-")
    return what if what in SEQUENCES and not clip.still else f"{clip.name}_{kind}.{suffix}"


def require(wanted: Sequence[str]) -> None:
    """Raises SetupError for the first package that one of the formats needs and that is not there."""
    chosen = set(wanted) & set(FORMATS)
    if chosen:
        machine.require("open3d", "mesh")
    if chosen & {"mesh-usd", "fused-usd", "mesh-abc"}:
        usd.modules()
    if "mesh-abc" in chosen:
        alembic.command()


def fused(clip: Clip) -> list[Mesh]:
    """The surface of every frame in full detail; all on one grid, so that what rests does not flicker."""
    box, found = drawing.bounds(clip.gaussians, clip.times), []
    for index, time in enumerate(clip.times):
        found.append(fusion.fuse(clip.gaussians, float(time), clip.meshing, box))
        clip.progress("fusing", index + 1, len(clip.times))
    return found


def per_frame(clip: Clip) -> list[Mesh]:
    """A reduced mesh a frame, its velocities those of the Gaussians around."""
    field, found = advection.Field(clip.gaussians), []
    for surface, time in zip(clip.surfaces, clip.times, strict=True):
        mesh = fusion.reduced(surface, clip.meshing.triangles)
        velocities = advection.Around(mesh.triangles).smooth(
            field.at(mesh.vertices, float(time)), advection.SMOOTH_VELOCITY
        )
        found.append(dataclasses.replace(mesh, velocities=velocities / clip.seconds))
    return found


def carried(clip: Clip) -> list[Mesh]:
    """The same triangles and colours in every frame; velocities lead straight to the next one."""
    start = start_frame(clip)
    mesh = fusion.reduced(clip.surfaces[start], clip.meshing.triangles)
    places = advection.carry(
        clip.gaussians, mesh, start, clip.times, clip.surfaces,
        lambda done, total: clip.progress("carrying", done, total),
    )  # fmt: skip
    steps = [(after - before) * clip.fps for before, after in itertools.pairwise(places)]
    steps.append(steps[-1] if steps else np.zeros_like(mesh.vertices))
    return [
        dataclasses.replace(mesh, vertices=place, velocities=step) for place, step in zip(places, steps, strict=True)
    ]


def start_frame(clip: Clip) -> int:
    """The frame whose mesh is carried: the nearest to the moment asked for, or that with the largest surface, where
    the fewest parts touch and are fused into one."""
    if clip.meshing.moment is not None:
        return int(np.abs(clip.times - clip.meshing.moment).argmin())
    areas = []
    for surface in clip.surfaces:
        a, b, c = (surface.vertices[surface.triangles[:, k]] for k in range(3))
        areas.append(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum())
    return int(np.argmax(areas))


def write_mesh(clip: Clip, target: Path, what: str) -> None:
    """Writes one mesh format; what several of them share is made once."""
    kind, suffix = what.split("-")
    meshes = clip.carried_meshes if kind == "mesh" else clip.frame_meshes
    upright = (clip.frame == "world" and suffix in ("usd", "obj")) or (clip.frame != "rub" and suffix == "ply")
    meshes = meshes if upright else [_turned(mesh) for mesh in meshes]

    def progress(done: int, total: int) -> None:
        clip.progress(what, done, total)

    if suffix == "usd":
        mesh_usd.write(meshes, target, clip.fps, up="z" if upright else "y", name=clip.name, progress=progress)
    elif suffix == "abc":
        alembic.write(meshes, target, clip.fps, clip.name)
        progress(1, 1)
    elif suffix == "glb":
        fileio.atomic_write(target, mesh_glb.encode(meshes, clip.fps, clip.name))
        progress(1, 1)
    else:
        encode = obj.encode if suffix == "obj" else mesh_ply.encode
        if clip.still:
            fileio.atomic_write(target, encode(meshes[0]))
            progress(1, 1)
            return
        of_time = {float(time): mesh for time, mesh in zip(clip.times, meshes, strict=True)}
        sequence.write(
            lambda time: encode(of_time[time]), target, clip.name, f".{suffix}", clip.times, clip.fps,
            overwrite=clip.overwrite, progress=progress,
        )  # fmt: skip


def _turned(mesh: Mesh) -> Mesh:
    """From our world to right, up, back."""
    return dataclasses.replace(mesh, vertices=mesh.vertices @ TO_Y_UP.T, velocities=mesh.velocities @ TO_Y_UP.T)
