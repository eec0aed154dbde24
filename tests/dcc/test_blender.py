"""Blender reads what we export: splat PLY with every attribute, meshes that are where they should be at every frame.

`make test-dcc` makes the environment with Blender (bpy) and runs this; elsewhere D2_BPY names a Python that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plyfile import PlyData
from surroundings import ROOT

sys.path.insert(0, str(ROOT / "tests" / "recon"))  # scenes.py
from scenes import gaussians_4d, spinning_ball

from d2.recon.exports import export
from d2.recon.mesh import MeshConfig

pytestmark = pytest.mark.dcc
FPS, FRAMES = 12, 4
COARSE = MeshConfig(voxels=40, cameras=16, triangles=1500)
MESHES = ["mesh-usd", "mesh-glb", "mesh-abc", "mesh-obj", "mesh-ply", "fused-usd", "fused-ply"]


@pytest.fixture(scope="module")
def blender() -> str:
    """The Python that has bpy."""
    python = os.environ.get("D2_BPY", str(ROOT / ".venv-dcc/bin/python"))
    if not Path(python).is_file():
        pytest.skip(f"{python} is absent: run make test-dcc, or set D2_BPY to a Python that has bpy")
    return python


@pytest.fixture(scope="module")
def files(blender, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2_BLENDER", blender)
        written = export(spinning_ball(), MESHES, folder, fps=FPS, frames=FRAMES, name="fox", meshing=COARSE)
    splats = export(gaussians_4d(200, 1), ["ply"], folder, time=0.5, name="splats")
    return written | splats


@pytest.fixture(scope="module")
def seen(blender, files, tmp_path_factory) -> dict[str, np.ndarray]:
    """What Blender makes of each file: world positions (z up) and attributes, by `name/frame/attribute`."""
    folder, every = tmp_path_factory.mktemp("seen"), list(range(1, FRAMES + 1))
    jobs = {what: (files[what], every) for what in ("mesh-usd", "mesh-abc", "fused-usd")}
    jobs["mesh-glb"] = (files["mesh-glb"], [frame - 1 for frame in every])  # glTF begins at 0 seconds
    jobs["ply"] = (files["ply"], [1])
    for k in (1, FRAMES):
        jobs |= {f"{what}{k}": (files[what] / f"fox_000{k}.{what[-3:]}", [1]) for what in ("mesh-obj", "mesh-ply")}
    (folder / "job.json").write_text(
        json.dumps({name: (str(path), FPS, frames) for name, (path, frames) in jobs.items()})
    )
    script = Path(__file__).with_name("in_bpy.py")
    done = subprocess.run(
        [blender, str(script), str(folder / "job.json"), str(folder / "seen.npz")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with np.load(folder / "seen.npz") as archive:
        return dict(archive)


def ply_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Positions and colours 0..1 as plyfile reads them: in our world, z up, as Blender's is."""
    vertex = PlyData.read(str(path))["vertex"].data
    return tuple(np.stack([np.asarray(vertex[n], float) for n in names], 1) / scale
                 for names, scale in ((("x", "y", "z"), 1), (("red", "green", "blue"), 255)))  # type: ignore[return-value]  # fmt: skip


def test_splat_ply_keeps_every_attribute(files, seen):
    vertex = PlyData.read(str(files["ply"]))["vertex"].data
    names = [name for name in vertex.dtype.names or () if name not in ("x", "y", "z", "nx", "ny", "nz")]
    assert {"f_dc_0", "f_rest_8", "opacity", "scale_2", "rot_3"} <= set(names)
    for name in names:
        np.testing.assert_allclose(seen[f"ply/1/{name}"], vertex[name], rtol=1e-6)


@pytest.mark.parametrize(("what", "first"), [("mesh-usd", 1), ("mesh-abc", 1), ("mesh-glb", 0)])
def test_carried_mesh_is_where_it_should_be_at_every_frame(files, seen, what, first):
    for k in range(FRAMES):
        expected, _ = ply_mesh(files["mesh-ply"] / f"fox_000{k + 1}.ply")
        np.testing.assert_allclose(seen[f"{what}/{first + k}/points"], expected, atol=1e-5)
    moved = seen[f"{what}/{first + FRAMES - 1}/points"] - seen[f"{what}/{first}/points"]
    assert np.abs(moved).max() > 0.2


def test_fused_meshes_change_their_triangles_from_frame_to_frame(files, seen):
    counts = set()
    for k in range(1, FRAMES + 1):
        expected, _ = ply_mesh(files["fused-ply"] / f"fox_000{k}.ply")
        np.testing.assert_allclose(seen[f"fused-usd/{k}/points"], expected, atol=1e-5)
        counts.add(len(expected))
    assert len(counts) > 1


@pytest.mark.parametrize("what", ["mesh-usd", "mesh-abc"])
def test_velocities_are_there_for_motion_blur(seen, what):
    step = seen[f"{what}/2/points"] - seen[f"{what}/1/points"]
    speed = np.linalg.norm(seen[f"{what}/1/velocity"], axis=1)
    np.testing.assert_allclose(speed, FPS * np.linalg.norm(step, axis=1), atol=1e-3)  # axes are the file's


@pytest.mark.parametrize("what", ["mesh-obj", "mesh-ply"])
def test_obj_and_ply_sequences_have_places_and_colours(files, seen, what):
    for k in (1, FRAMES):
        places, colors = ply_mesh(files["mesh-ply"] / f"fox_000{k}.ply")
        np.testing.assert_allclose(seen[f"{what}{k}/1/points"], places, atol=2e-5)
        name = "Color" if what == "mesh-obj" else "Col"
        linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        np.testing.assert_allclose(seen[f"{what}{k}/1/{name}"][:, :3], linear, atol=0.01)


def test_usd_colours_arrive_as_they_were_written(files, seen):
    _, colors = ply_mesh(files["mesh-ply"] / "fox_0001.ply")
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(seen["mesh-usd/1/displayColor"][:, :3], linear, atol=0.01)


ANIMATED = """
import json, runpy, sys
import bpy, numpy as np
bpy.ops.wm.read_factory_settings(use_empty=True)
runpy.run_path(sys.argv[-2])
scene, told = bpy.context.scene, {"fps": bpy.context.scene.render.fps / bpy.context.scene.render.fps_base}
for frame in range(scene.frame_start, scene.frame_end + 1):
    scene.frame_set(frame)
    (thing,) = [o for o in scene.objects if o.type == "MESH" and not o.hide_render]
    places = np.empty(3 * len(thing.data.vertices), np.float32)
    thing.data.vertices.foreach_get("co", places)
    world = places.reshape(-1, 3) @ np.array(thing.matrix_world)[:3, :3].T
    drawn = sum(i.is_instance for i in bpy.context.evaluated_depsgraph_get().object_instances)
    told[frame] = {"name": thing.name, "points": world.tolist(), "drawn": drawn}
json.dump(told, open(sys.argv[-1], "w"))
"""


def test_our_script_imports_the_sequence_and_animates_it(blender, tmp_path):
    gaussians = gaussians_4d(60, 1)
    gaussians.opacity_logits[:] = 2.0
    gaussians.log_durations[:] = 3.0  # nothing fades, so that every frame has them all
    folder = export(gaussians, ["ply"], tmp_path, fps=FPS, frames=FRAMES, name="clip")["ply"]
    words = [blender, "-c", ANIMATED, str(folder / "import_in_blender.py"), str(tmp_path / "told.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told.pop("fps") == FPS and list(told) == [str(1 + k) for k in range(FRAMES)]
    for k, seen in enumerate(told.values()):
        assert seen["name"] == f"clip_{k + 1:04d}.ply" and seen["drawn"] == 60
        expected = gaussians.at(k / (FRAMES - 1)).means
        np.testing.assert_allclose(seen["points"], expected.numpy(), atol=1e-4)
