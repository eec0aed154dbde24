"""Meshes lie where the Gaussians are, move as they move, and mean the same in every format."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scenes import camera, gaussians, spinning_ball
from typer.testing import CliRunner

from d2.cli.export import export as command
from d2.errors import InputError, SetupError
from d2.recon import drawing
from d2.recon.exports import export
from d2.recon.gaussians import Gaussians4D
from d2.recon.mesh import Mesh, MeshConfig, advection, fusion
from d2.recon.placement import Placement
from d2.recon.raster import rasterize
from d2.recon.raster.depth import surface

try:
    o3d = pytest.importorskip(
        "open3d", exc_type=ImportError, reason="open3d is not installed: pip install -e '.[mesh]'"
    )
except OSError as error:  # a system library is missing
    pytest.skip(str(error), allow_module_level=True)

RADIUS, TURN, FRAMES = 0.4, 1.0, 3
COARSE = MeshConfig(voxels=40, cameras=32, triangles=1500)


@pytest.fixture(scope="module")
def ball() -> Gaussians4D:
    return spinning_ball(turn=TURN, radius=RADIUS)


@pytest.fixture(scope="module")
def fused(ball) -> list[Mesh]:
    box = drawing.bounds(ball, [0.0, 0.5, 1.0])
    return [fusion.fuse(ball, time, COARSE, box) for time in np.linspace(0, 1, FRAMES)]


def turned(points: np.ndarray, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T


# -- depth and fusion ------------------------------------------------------------------------------------


def test_colour_of_the_surface_is_that_of_the_rasterizer():
    scene = {name: tensor.float() for name, tensor in gaussians(300).items()}
    viewmat, K = (tensor.float() for tensor in camera(40, 32))
    image, alpha, _ = rasterize(**scene, viewmats=viewmat[None], Ks=K[None], width=40, height=32)
    color, depth = surface(*scene.values(), viewmat, K, 40, 32)
    straight = (image[0] / alpha[0].clamp_min(1e-6)).numpy()
    opaque = alpha[0, ..., 0].numpy() > 0.5
    np.testing.assert_allclose(color[opaque], straight[opaque], atol=0.03)
    assert opaque.sum() > 50 and (depth[alpha[0, ..., 0].numpy() > 0.501] > 0).all()
    assert (depth[alpha[0, ..., 0].numpy() < 0.499] == 0).all()


def test_median_depth_of_a_slanted_plane_is_the_plane():
    """Flat discs in a plane z = 3 + x / 2, the camera at the origin: their centres alone would give stairs."""
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 13), np.linspace(-1.5, 1.5, 13))
    means = torch.tensor(np.stack([x, y, 3 + x / 2], -1).reshape(-1, 3), dtype=torch.float32)
    tilt = -math.atan(0.5)
    quats = torch.tensor([[math.cos(tilt / 2), 0, math.sin(tilt / 2), 0]]).repeat(len(means), 1)
    scales = torch.tensor([[0.2, 0.2, 1e-3]]).repeat(len(means), 1)
    K = torch.tensor([[100.0, 0, 24], [0, 100, 24], [0, 0, 1]])
    opaque, grey = torch.full((len(means),), 0.99), torch.full((len(means), 3), 0.5)
    _, depth = surface(means, quats, scales, opaque, grey, torch.eye(4), K, 48, 48)
    slope = (np.arange(48) + 0.5 - 24) / 100
    expected = np.broadcast_to(3 / (1 - slope / 2), (48, 48))
    np.testing.assert_allclose(depth[8:-8, 8:-8], expected[8:-8, 8:-8], rtol=0.006)


def test_a_fused_ball_is_a_ball_without_holes_of_its_size_and_colours(fused):
    for mesh in fused:
        radii = np.linalg.norm(mesh.vertices, axis=1)
        voxel = 2 * RADIUS / COARSE.voxels
        assert 0 < radii.mean() - RADIUS < 1.6 * voxel and radii.std() < 0.4 * voxel  # blurred pixels swell it
        edges = np.sort(mesh.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        assert (np.unique(edges, axis=0, return_counts=True)[1] != 2).mean() < 0.01  # an edge has two triangles
        outward = mesh.vertices / radii[:, None]
        facing = (advection.normals(mesh.vertices, mesh.triangles) * outward).sum(1)
        assert np.quantile(facing, 0.03) > 0.85  # slivers that close a hole may lean
    still = fused[0]  # at time 0 every Gaussian that is seen has its own colour near its own place
    expected = 0.5 + 0.5 * still.vertices / RADIUS
    assert np.abs(still.colors - expected.clip(0, 1)).mean() < 0.06


def test_floaters_go_and_parts_stay(ball):
    def beside(x: float, scale: float, count: int) -> Gaussians4D:
        small = spinning_ball(count, 0.0, RADIUS * scale)
        shift = torch.tensor([x, 0, 0])
        return dataclasses.replace(small, means=small.means + shift)

    def joined(*parts: Gaussians4D) -> Gaussians4D:
        tensors = zip(*(part.tensors().items() for part in parts), strict=True)
        return Gaussians4D(**{group[0][0]: torch.cat([tensor for _, tensor in group]) for group in tensors})

    mesh = fusion.fuse(joined(ball, beside(1.0, 0.6, 5000), beside(-0.8, 0.05, 200)), 0.5, COARSE)
    x = mesh.vertices[:, 0]
    assert x.min() > -0.7 and 0.1 < (x > 0.6).mean() < 0.5


def test_reducing_keeps_the_ball(fused):
    small = fusion.reduced(fused[1], 600)
    assert 500 < len(small.triangles) <= 600 and fusion.reduced(small, 0) is small
    assert np.abs(np.linalg.norm(small.vertices, axis=1) - RADIUS).max() < 2.5 * (2 * RADIUS / COARSE.voxels)


def test_nothing_opaque_is_one_line(ball):
    for logit in (-4.5, -9.0):  # too faint together, and each for itself
        faint = dataclasses.replace(ball, opacity_logits=torch.full((len(ball),), logit))
        with pytest.raises(InputError, match="no surface to mesh"):
            fusion.fuse(faint, 0.5, COARSE)


# -- one mesh for the clip -------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
def test_vertices_turn_with_the_ball_though_no_gaussian_lives_as_long(ball, fused, held):
    mesh, times = fusion.reduced(fused[0], 1500), np.linspace(0, 1, 9)
    every = [fused[0]] * 9 if held else None  # a turning ball is the same surface at every moment
    places = advection.carry(ball, mesh, 0, times, every)
    errors = [np.linalg.norm(p - turned(mesh.vertices, TURN * t), axis=1) for p, t in zip(places, times, strict=True)]
    assert errors[-1].mean() < 0.12 * RADIUS  # of a way of 0.8 radii
    drift = np.abs(np.linalg.norm(places[-1], axis=1) - np.linalg.norm(mesh.vertices, axis=1)).mean()
    assert drift < (0.02 if held else 0.06) * RADIUS
    backwards = advection.carry(ball, mesh, 8, times, every)[0]
    assert np.linalg.norm(backwards - turned(mesh.vertices, -TURN), axis=1).mean() < 0.12 * RADIUS


def test_averages_over_a_mesh_keep_constants_and_calm_noise():
    triangles = np.array([[0, 1, 2], [2, 1, 3], [2, 3, 4]])
    around = advection.Around(triangles)
    np.testing.assert_allclose(around.smooth(np.full((5, 2), 3.0), 4), 3.0)
    spike = np.array([[1.0], [0], [0], [0], [0]])
    np.testing.assert_allclose(around.smooth(spike, 1)[:, 0], [0.5, 1 / 6, 1 / 8, 0, 0])


# -- export ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(ball, tmp_path_factory) -> tuple[dict[str, Path], list[tuple[str, int, int]]]:
    """Every mesh format but Alembic, 3 frames at 12 a second, 1.8 m tall, on the ground."""
    pytest.importorskip("pxr", reason="usd-core is not installed: pip install -e '.[usd]'")
    calls = []
    formats = ["mesh-usd", "mesh-glb", "mesh-obj", "mesh-ply", "fused-usd", "fused-obj", "fused-ply"]
    files = export(
        ball, formats, tmp_path_factory.mktemp("out"), fps=12, frames=FRAMES, name="fox", meshing=COARSE,
        placement=Placement(1.8, "ground"), progress=lambda *call: calls.append(call),
    )  # fmt: skip
    return files, calls


def read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, triangles and colours as Open3D reads them."""
    mesh = o3d.io.read_triangle_mesh(str(path))
    return tuple(np.asarray(array) for array in (mesh.vertices, mesh.triangles, mesh.vertex_colors))  # type: ignore[return-value]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The farthest that a point of one set is from the other set; Open3D orders what it reads as it likes."""
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return float(max(distances.min(0).max(), distances.min(1).max()))


def sampled(path: Path, time: float | None) -> dict[str, np.ndarray]:
    from pxr import Usd, UsdGeom

    stage = Usd.Stage.Open(str(path))
    mesh = UsdGeom.Mesh(stage.GetDefaultPrim().GetChildren()[0])
    code = Usd.TimeCode.Default() if time is None else Usd.TimeCode(time)
    found = {
        "points": mesh.GetPointsAttr(), "velocities": mesh.GetVelocitiesAttr(), "color": mesh.GetDisplayColorAttr(),
        "indices": mesh.GetFaceVertexIndicesAttr(), "samples": mesh.GetFaceVertexIndicesAttr(),
    }  # fmt: skip
    values = {name: np.asarray(attribute.Get(code)) for name, attribute in found.items() if name != "samples"}
    return values | {"samples": np.array(found["samples"].GetNumTimeSamples())}


def test_files_and_folders_are_named_after_what_they_hold_and_the_work_is_done_once(written):
    files, calls = written
    names = {what: path.name for what, path in files.items()}
    assert names == {
        "mesh-usd": "fox_mesh.usd", "mesh-glb": "fox_mesh.glb", "mesh-obj": "mesh-obj", "mesh-ply": "mesh-ply",
        "fused-usd": "fox_fused.usd", "fused-obj": "fused-obj", "fused-ply": "fused-ply",
    }  # fmt: skip
    assert sorted(p.name for p in files["fused-ply"].iterdir()) == [
        *(f"fox_000{k}.ply" for k in (1, 2, 3)),
        "frames.json",
    ]
    assert json.loads((files["mesh-obj"] / "frames.json").read_text())["fps"] == 12
    assert [call for call in calls if call[0] == "fusing"] == [("fusing", k, 3) for k in (1, 2, 3)]
    assert [call for call in calls if call[0] == "carrying"] == [("carrying", k, 3) for k in (2, 3)]


def test_every_format_holds_the_same_vertices_at_every_frame(written):
    files, _ = written
    to_world = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    for kind in ("mesh", "fused"):
        for k in (1, 2, 3):
            ply, triangles, _ = read(files[f"{kind}-ply"] / f"fox_000{k}.ply")
            obj, same, _ = read(files[f"{kind}-obj"] / f"fox_000{k}.obj")
            usd = sampled(files[f"{kind}-usd"], k)
            assert ply[:, 2].min() == pytest.approx(0, abs=0.1) and ply[:, 2].max() == pytest.approx(1.8, abs=0.1)
            assert apart(obj @ to_world.T, ply) < 2e-5
            np.testing.assert_allclose(usd["points"] @ to_world.T, ply, atol=2e-6)
            assert len(triangles) == len(same) and np.array_equal(usd["indices"].reshape(-1, 3), triangles)
    assert sampled(files["mesh-usd"], 1)["samples"] == 0 and sampled(files["fused-usd"], 1)["samples"] == 3


def test_velocities_of_the_carried_mesh_lead_to_the_next_frame(written):
    files, _ = written
    first, second, between = (sampled(files["mesh-usd"], k) for k in (1, 2, 1.5))
    np.testing.assert_allclose(first["points"] + first["velocities"] / 12, second["points"], atol=1e-5)
    np.testing.assert_allclose(between["points"], 0.5 * (first["points"] + second["points"]), atol=1e-5)


def test_velocities_of_fused_meshes_are_those_of_the_turning_ball(written):
    files, _ = written
    middle = sampled(files["fused-usd"], 2)
    spin = TURN / (2 / 12)  # rad a second: two steps of a twelfth
    expected = spin * np.cross([0.0, 1, 0], middle["points"])  # y is up
    reach = np.linalg.norm(expected, axis=1).max()
    assert np.linalg.norm(middle["velocities"] - expected, axis=1).mean() < 0.12 * reach


def test_colours_are_display_referred_in_ply_and_obj_and_linear_in_usd(written):
    files, _ = written
    _, _, bytes_ = read(files["mesh-ply"] / "fox_0001.ply")
    text = np.array(
        [line.split()[4:] for line in (files["mesh-obj"] / "fox_0001.obj").read_text().splitlines() if line[0] == "v"],
        float,
    )
    np.testing.assert_allclose(text, bytes_, atol=0.003)
    linear = np.where(text <= 0.04045, text / 12.92, ((text + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(sampled(files["mesh-usd"], None)["color"], linear, atol=1e-3)


def test_validation_of_usd_finds_no_error_in_meshes(written):
    from pxr import Usd, UsdValidation

    context = UsdValidation.ValidationContext(UsdValidation.ValidationRegistry().GetOrLoadAllValidators())
    for what in ("mesh-usd", "fused-usd"):
        stage = Usd.Stage.Open(str(written[0][what]))
        assert [error.GetMessage() for error in context.Validate(stage)] == []


def test_a_still_is_one_file_without_motion(ball, tmp_path):
    files = export(ball, ["mesh-glb", "mesh-ply", "fused-obj"], tmp_path, time=0.5, name="fox", meshing=COARSE)
    assert sorted(path.name for path in files.values()) == ["fox_fused.obj", "fox_mesh.glb", "fox_mesh.ply"]
    glb, ply = read(files["mesh-glb"])[0], read(files["mesh-ply"])[0]
    assert apart(glb, ply @ np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]).T) < 1e-6


def test_command_takes_fields_and_refuses_wrong_ones(ball, tmp_path):
    ball.save(tmp_path / "gaussians.safetensors", {"frames": "2"})
    app = typer.Typer()
    app.command()(command)
    words = [str(tmp_path), "--format", "mesh-ply", "--set", "voxels=24", "--set", "cameras=12", "--set", "moment=1"]
    run = CliRunner().invoke(app, [*words, "--up", "y"])
    assert run.exit_code == 0 and run.output.startswith("mesh-ply: "), run.output
    run = CliRunner().invoke(app, [*words, "--set", "voxel=3", "--overwrite"])
    assert isinstance(run.exception, InputError) and "did you mean voxels" in str(run.exception)


def test_without_blender_alembic_is_refused_before_any_work(ball, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("D2_BLENDER", raising=False)
    with pytest.raises(SetupError, match="pip install bpy"):
        export(ball, ["mesh-abc"], tmp_path / "out", meshing=COARSE)
    monkeypatch.setenv("D2_BLENDER", "nosuch")
    with pytest.raises(SetupError, match="D2_BLENDER=nosuch is no program"):
        export(ball, ["mesh-abc"], tmp_path / "out", meshing=COARSE)
    assert not (tmp_path / "out").exists()
