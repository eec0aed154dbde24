"""Meshes of a reconstruction: time, size, and how far the carried mesh drifts from the surface fused at each frame.

    d2 reconstruct PANDA --out runs/meshes --preset fast --set size=128
    python benchmarks/meshes.py runs/meshes [--blender .venv-dcc/bin/python]

Drift is the Chamfer distance over the object's extent: the mean distance from points spread evenly over one surface to
the other surface, averaged over both directions.  `free` is the mesh that only rides on the Gaussians, `held` the one
that is exported, and `reduced` tells what reducing the triangles of the fused surface costs by itself.  Writes
benchmarks/results/meshes.json and, with --blender (a Python that has bpy), meshes.webp: above the splats, below the
exported USD, imported and rendered by Blender, at four frames.  Seconds are those of all cores together.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from d2 import fileio, images, machine
from d2.recon import drawing
from d2.recon.exports import Clip
from d2.recon.formats import ply
from d2.recon.mesh import Mesh, advection, fusion
from d2.recon.mesh import write as meshes
from d2.recon.sources import find
from d2.run import frame_time

o3d: Any = machine.require("open3d", "mesh")

RESULTS = Path(__file__).parent / "results"
SAMPLES = 20_000
FORMATS = ("mesh-usd", "mesh-glb", "mesh-obj", "mesh-ply", "fused-usd", "fused-obj", "fused-ply")
SIDE, ELEVATION = 256, 0.2  # of the picture: pixels of a tile, rad
FRAMES, AZIMUTHS = (0, 6, 12, 18), (0.6, 0.6, 2.2, 4.2)  # rad


def main(run: Path, blender: Path | None = None) -> None:
    source = find(run)
    times = np.array([frame_time(k, source.frames) for k in range(source.frames)])
    clip = Clip(
        source.gaussians, "panda", times, source.fps, ply.Layout(), 512, True, _print, False, None, source.frames
    )
    seconds: dict[str, float] = {}

    def timed(what: str, call: Any) -> Any:
        begin = time.process_time()
        result = call()
        seconds[what] = round(time.process_time() - begin, 1)
        return result

    fusion.fuse(source.gaussians, 0.5, clip.meshing)  # kernels compile
    surfaces = timed("fusing", lambda: clip.surfaces)
    held = timed("carrying", lambda: clip.carried_meshes)
    start = meshes.start_frame(clip)
    small = fusion.reduced(surfaces[start], clip.meshing.triangles)
    free = advection.carry(source.gaussians, small, start, times, None)
    timed("reducing", lambda: clip.frame_meshes)
    extent = float(np.ptp(surfaces[start].vertices, axis=0).max())
    drift = {
        "held": _drift([mesh.vertices for mesh in held], small, surfaces, extent),
        "free": _drift(free, small, surfaces, extent),
        "reduced": _summary([_chamfer(a, b) / extent for a, b in zip(clip.frame_meshes, surfaces, strict=True)]),
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes = {what.replace("-", "_"): _written(clip, Path(folder), what) for what in FORMATS}
        if blender is not None:
            _picture(clip, Path(folder) / "panda_mesh.usd", blender)
    record = {
        "machine": machine.describe(), "gaussians": len(source.gaussians), "frames": source.frames,
        "start_frame": start, "triangles": {"fused": len(surfaces[start].triangles), "written": len(small.triangles)},
        "cpu_seconds": seconds, "drift_over_extent": drift, "megabytes": sizes,
    }  # fmt: skip
    fileio.write_json(RESULTS / "meshes.json", record)


def _print(what: str, done: int, total: int) -> None:
    print(what, done, "of", total, flush=True)


def _drift(places: list[np.ndarray], mesh: Mesh, surfaces: list[Mesh], extent: float) -> dict[str, Any]:
    moved = [Mesh(place, mesh.triangles, mesh.colors, mesh.velocities) for place in places]
    return _summary([_chamfer(a, b) / extent for a, b in zip(moved, surfaces, strict=True)])


def _summary(values: list[float]) -> dict[str, Any]:
    rounded = [round(value, 6) for value in values]
    return {"mean": round(float(np.mean(values)), 6), "max": max(rounded), "frames": rounded}


def _chamfer(a: Mesh, b: Mesh) -> float:
    """World."""
    return 0.5 * (_distance(a, b) + _distance(b, a))


def _distance(a: Mesh, b: Mesh) -> float:
    """The mean distance of points of a from b."""
    vector, triples = o3d.utility.Vector3dVector, o3d.utility.Vector3iVector
    points = o3d.geometry.TriangleMesh(vector(a.vertices), triples(a.triangles)).sample_points_uniformly(SAMPLES)
    scene, tensor = o3d.t.geometry.RaycastingScene(), o3d.core.Tensor.from_numpy
    scene.add_triangles(tensor(b.vertices.astype(np.float32)), tensor(b.triangles.astype(np.uint32)))
    return float(scene.compute_distance(tensor(np.asarray(points.points, np.float32))).numpy().mean())


def _written(clip: Clip, folder: Path, what: str) -> float:
    """MB of one format."""
    target = folder / meshes.file_name(what, clip)
    meshes.write_mesh(clip, target, what)
    files = [target] if target.is_file() else list(target.iterdir())
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def _picture(clip: Clip, usd: Path, blender: Path) -> None:
    """Splats above, the same frames by Blender below."""
    framed = drawing.framing(clip.gaussians)
    rig = drawing.orbit_rig(0.88 * framed.radius, np.array(AZIMUTHS), SIDE, SIDE, ELEVATION)
    c2w = rig.c2w
    c2w[:, :3, 3] += framed.center
    splats = drawing.render_views(clip.gaussians, c2w, rig.K, SIDE, SIDE, clip.times[list(FRAMES)], drawing.WHITE)
    above = [Image.fromarray(images.to_uint8(picture[..., :3])) for picture in splats]
    job = {"usd": str(usd), "size": SIDE, "fov": rig.fov, "out": str(usd.with_suffix("")),
           "shots": [{"frame": k + 1, "c2w": m.tolist()} for k, m in zip(FRAMES, c2w, strict=True)]}  # fmt: skip
    fileio.write_json(usd.with_suffix(".json"), job)
    script = Path(__file__).parent / "blender_picture.py"
    subprocess.run([str(blender), str(script), str(usd.with_suffix(".json"))], check=True)
    sheet = Image.new("RGB", (SIDE * len(FRAMES), 2 * SIDE), "white")
    for k, picture in enumerate(above):
        sheet.paste(picture, (k * SIDE, 0))
        with Image.open(f"{job['out']}_{k}.png") as drawn:
            sheet.paste(drawn, (k * SIDE, SIDE), drawn)
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=80)
    fileio.atomic_write(RESULTS / "meshes.webp", buffer.getvalue())


if __name__ == "__main__":
    typer.run(main)
