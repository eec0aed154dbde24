"""Cameras as USD and glTF, and what stands beside an export: what other readers see is what our rig saw."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from sets import ordinary_set, through_splat_transform
from test_glb import validator

from d2 import camera
from d2.errors import InputError, SetupError
from d2.recon import cameras, handout
from d2.recon.exports import export
from d2.recon.formats import glb, sog
from d2.recon.formats.ply import Layout
from d2.recon.gaussians import Gaussians4D
from d2.recon.placement import Placement, place

POINT = np.array([0.21, -0.14, 0.32])  # world
WIDTH, HEIGHT, FPS, TIMES = 80, 60, 12.0, [0.0, 0.5, 1.0]


def rig() -> camera.Rig:
    return camera.orbit(3, elevation_deg=20, radius=3.0, width=WIDTH, height=HEIGHT)


def seen(c2w: np.ndarray, point: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixel [2] of a world point."""
    x, y, z = K @ (camera.viewmats(c2w[None])[0] @ [*point, 1])[:3]
    return np.array([x / z, y / z])


@pytest.fixture(params=["standing", "moving"])
def made(request, tmp_path) -> tuple[Path, bool, np.ndarray]:
    """A reconstruction's folder, whether its camera moves, and K with a principal point beside the middle."""
    moving, K = request.param == "moving", rig().K + np.array([[0, 0, 3], [0, 0, -2], [0, 0, 0]])
    folder = tmp_path / "fox" / "recon" / "main"
    gaussians = Gaussians4D.still(ordinary_set(1, 40, 0))
    gaussians.save(folder / "gaussians.safetensors", {"fps": f"{FPS:g}", "frames": "3"})
    lens = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
    times = [(v, t) for v in range(3) for t in ([TIMES[v]] if moving else TIMES)]
    frames = [{"transform_matrix": rig().c2w[v].tolist(), "time": t} for v, t in times]
    (folder / cameras.FILE).write_text(json.dumps({"w": WIDTH, "h": HEIGHT, **lens, "frames": frames}))
    return folder, moving, K


def moved_point(folder: Path, placement: Placement) -> np.ndarray:
    _, s = place(Gaussians4D.load(folder / "gaussians.safetensors"), TIMES, placement)
    return s.scale * s.rotation @ POINT + s.offset


@pytest.mark.parametrize("up", ["y", "z"])
@pytest.mark.parametrize("placement", [Placement(), Placement(1.8, "ground", "x")])
def test_usd_cameras_see_a_point_where_our_rig_sees_it(made, tmp_path, up, placement):
    usd = pytest.importorskip("pxr.Usd", reason="usd-core is not installed: pip install -e '.[usd]'")
    from pxr import Gf, UsdGeom

    folder, moving, K = made
    path = export(folder, ["cameras"], tmp_path / "out", up=up, placement=placement)["cameras"]
    stage = usd.Stage.Open(str(path))
    assert stage.GetTimeCodesPerSecond() == FPS and (stage.GetStartTimeCode(), stage.GetEndTimeCode()) == (1, 3)
    found = {p.GetName(): UsdGeom.Camera(p) for p in stage.Traverse() if p.IsA(UsdGeom.Camera)}
    assert sorted(found) == (["input"] if moving else ["input", "view_00", "view_01"])
    point = moved_point(folder, placement)
    shown = Gf.Vec3d(*(camera.TO_Y_UP @ point if up == "y" else point).tolist())
    for view in range(3):
        prim = found["input"] if moving or view == 2 else found[f"view_{view:02d}"]
        lens = prim.GetCamera(1 + view if moving else 1)
        assert lens.horizontalAperture == pytest.approx(0.36)  # 36 mm, in tenths of a metre
        frustum = lens.frustum
        ndc = (frustum.ComputeViewMatrix() * frustum.ComputeProjectionMatrix()).Transform(shown)
        pixel = [(ndc[0] + 1) / 2 * WIDTH, (1 - ndc[1]) / 2 * HEIGHT]
        np.testing.assert_allclose(pixel, seen(rig().c2w[view], POINT, K), atol=1e-4 * WIDTH)


def test_glb_cameras_see_a_point_where_our_rig_sees_it(made, tmp_path):
    folder, moving, K = made
    placement = Placement(1.8, "ground", "x")
    path = export(folder, ["cameras"], tmp_path / "out", placement=placement)["cameras"].with_suffix(".glb")
    document, binary = glb.unpack(path.read_bytes(), "a")
    point = camera.TO_Y_UP @ moved_point(folder, placement)
    centred = np.array([[K[0, 0], 0, WIDTH / 2], [0, K[1, 1], HEIGHT / 2], [0, 0, 1]])  # glTF knows no shift
    names = [node["name"] for node in document["nodes"]]
    assert names == (["input"] if moving else ["view_00", "view_01", "input"])
    for view in range(3):
        node = document["nodes"][0 if moving else view]
        place_of, turn = np.array(node["translation"]), np.array(node["rotation"])
        if moving:
            seconds, places, turns = (_floats(document, binary, k) for k in range(3))
            np.testing.assert_allclose(seconds[:, 0], np.arange(3) / FPS, atol=1e-7)
            place_of, turn = places[view], turns[view]
        lens = document["cameras"][node["camera"]]["perspective"]
        x, y, z = _matrix(turn).T @ (point - place_of)
        cot = 1 / np.tan(lens["yfov"] / 2)
        pixel = [(x * cot / lens["aspectRatio"] / -z + 1) / 2 * WIDTH, (1 - y * cot / -z) / 2 * HEIGHT]
        np.testing.assert_allclose(pixel, seen(rig().c2w[view], POINT, centred), atol=1e-4 * WIDTH)


def _floats(document: dict, binary: bytes, index: int) -> np.ndarray:
    accessor = document["accessors"][index]
    width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
    start = document["bufferViews"][accessor["bufferView"]]["byteOffset"]
    return np.frombuffer(binary, "<f4", width * accessor["count"], start).reshape(-1, width).astype(float)


def _matrix(q: np.ndarray) -> np.ndarray:
    """Rotation of a quaternion x y z w, column by column v + 2 u × (u × v + w v)."""
    u, w = q[:3], q[3]
    return np.stack([e + 2 * np.cross(u, np.cross(u, e) + w * e) for e in np.eye(3)], 1)


def test_the_validator_finds_nothing_wrong_with_the_cameras(made, tmp_path):
    call = validator()
    path = export(made[0], ["cameras"], tmp_path / "out")["cameras"].with_suffix(".glb")
    done = subprocess.run([*call, str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["issues"]["numErrors"] == 0


def test_cameras_that_are_not_known_are_refused_before_anything_is_written(made, tmp_path):
    (made[0] / cameras.FILE).unlink()
    with pytest.raises(InputError, match="cameras of the input are not known"):
        export(made[0], ["ply", "cameras"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_readme_names_files_that_exist_and_the_facts_of_the_clip(made, tmp_path):
    folder = tmp_path / "out"
    export(made[0], ["ply", "usd", "cameras"], folder, placement=Placement(1.8, "ground"))
    for readme in (folder / "README.txt", folder / "ply" / "README.txt"):
        text = readme.read_text()
        assert "40 Gaussians, 3 frames at 12 a second (0.25 s), 1.800 high" in text
        names = {
            word.strip("(),.:;")
            for word in text.split()
            if word.strip("(),.:;").endswith((".usd", ".usda", ".glb", ".ply", ".py"))
        }
        assert names and all((readme.parent / name.replace("$F4", "0001")).is_file() for name in names)
        for program in ("Blender", "Houdini", "Unreal", "Unity", "Nuke", "SuperSplat"):
            assert program in text
    (folder / "README.txt").write_text("mine")
    export(made[0], ["usd"], folder, overwrite=True)
    assert (folder / "README.txt").read_text() == "mine"


@pytest.mark.parametrize("axes", ["rdf", "rub", "world"])
def test_the_blender_script_stands_beside_the_sequence_and_knows_its_axes(made, tmp_path, axes):
    path = export(made[0], ["ply"], tmp_path / "out", frame=axes)["ply"] / handout.BLENDER
    tree = ast.parse(path.read_text(), feature_version=(3, 11))
    named = {node.targets[0].id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    assert named["AXES"] == repr(axes)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"json", "os", "bpy", "numpy"}  # Blender brings the last two


def test_sog_holds_the_values_within_its_quantisation(tmp_path):
    if not os.environ.get("D2_SPLAT_TRANSFORM") and not shutil.which("splat-transform"):
        pytest.skip("no splat-transform: neither $D2_SPLAT_TRANSFORM nor on the PATH")
    gaussians = ordinary_set(7, 300, 0)
    (tmp_path / "a.sog").write_bytes(sog.encode(gaussians, Layout("world")))
    back = through_splat_transform(tmp_path / "a.sog")
    near = np.linalg.norm(back.means.numpy()[:, None] - gaussians.means.numpy()[None], axis=-1)  # its order is its own
    assert near.min(1).max() < 0.02 and len(set(near.argmin(1))) == 300
    np.testing.assert_allclose(back.opacities, gaussians.opacities[near.argmin(1)], atol=0.02)


def test_sog_without_its_converter_says_how_to_get_it(made, tmp_path, monkeypatch):
    monkeypatch.delenv("D2_SPLAT_TRANSFORM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="npm install -g @playcanvas/splat-transform"):
        export(made[0], ["ply", "sog"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
