"""`d2 import`: folders in each tool's exact layout, their cameras proved by projecting a point into the pictures."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from faults.assertions import expect_fault
from test_cli import d2  # noqa: F401

from d2 import camera, images
from d2.errors import D2Error
from d2.recon import dataset, pipeline
from d2.recon.exports import export
from d2.recon.importers import colmap
from d2.recon.importers.bring import bring
from d2.run import Run

SIZE, F = 64, 3
POINTS = [np.array([0.5 - 0.4 * f, 0.3, 0.4]) for f in range(F)]  # world, where the dot is at each moment


def dot(viewmat: np.ndarray, K: np.ndarray, point: np.ndarray, size: Sequence[int] = (SIZE, SIZE)) -> np.ndarray:
    """RGBA [H, W, 4]: a red disc where a camera sees the point."""
    x, y = project(viewmat, K, point)
    columns, rows = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    alpha = np.clip(5.5 - np.hypot(columns - x, rows - y), 0, 1)
    return images.to_uint8(np.dstack([np.full_like(alpha, 0.9), alpha * 0, alpha * 0, alpha]))


def project(viewmat, K, point) -> np.ndarray:
    seen = K @ (viewmat[:3, :3] @ point + viewmat[:3, 3])
    return seen[:2] / seen[2]


def rig(azimuths_deg: Sequence[float], elevation_deg: float, radius: float = camera.DEFAULT_RADIUS, fov_deg=33.8):
    azimuth = np.radians(azimuths_deg)
    elevation = np.full(len(azimuth), np.radians(elevation_deg))
    return camera.Rig(azimuth, elevation, radius, np.radians(fov_deg), SIZE, SIZE)


def video(path: Path, pictures: list[np.ndarray]) -> None:
    """On white, as an MP4 of 10 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path), (SIZE, SIZE), fps=10, codec="libx264", quality=9, macro_block_size=1
    )
    writer.send(None)
    for rgba in pictures:
        alpha = rgba[..., 3:] / 255
        writer.send(np.ascontiguousarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)))
    writer.close()


def shots(rig: camera.Rig) -> list[list[np.ndarray]]:  # [V][F]
    return [[dot(viewmat, rig.K, point) for point in POINTS] for viewmat in rig.viewmats]


def assert_reprojects(folder: Path, points: Callable[[float], np.ndarray], split: str = "train", within=0.6) -> None:
    """Every picture of a run shows its dot where its own camera sees the point at its own time."""
    data = dataset.load(folder, split)
    for k in range(len(data)):
        picture = data.images[k].float().numpy() / 255
        darkness = picture[..., 3] if data.has_alpha else 1 - picture[..., 1]
        darkness = np.where(darkness > 0.3, darkness, 0)
        rows, columns = np.indices(darkness.shape) + 0.5
        found = np.array([(columns * darkness).sum(), (rows * darkness).sum()]) / darkness.sum()
        expected = project(data.viewmats[k].numpy(), data.Ks[k].numpy(), points(float(data.times[k])))
        assert np.abs(found - expected).max() < within, (data.names[k], found, expected)


def at(time: float) -> np.ndarray:
    return POINTS[round(time * (F - 1))]


# -- videos --------------------------------------------------------------------------------------------------

SV4D = [360 * k / 21 for k in (0, 2, 5, 7, 9, 12, 14, 16, 19)]


def write_sv4d(
    folder: Path, azimuths: Sequence[float], elevation: float, first: str = "process_input", base: int = 0
) -> None:
    """What the sampling scripts leave; `first` is what the input is called, with v000 as SV4D wrote it at first."""
    for v, pictures in enumerate(shots(rig(azimuths, elevation))):
        video(folder / f"{base:06d}_{f'v{v:03d}' if v else first}.mp4", pictures)
    if azimuths == SV4D:
        video(folder / f"{base:06d}_t000.mp4", shots(rig(azimuths, elevation))[0])
        video(folder / f"{base:06d}_diag.mp4", shots(rig(azimuths, elevation))[0])


@pytest.mark.parametrize(
    ("azimuths", "elevation", "first"),
    [
        (SV4D, 10, "process_input"),
        (SV4D, 10, "v000"),
        ((0, 60, 120, 180, 240), 0, "process_input"),
        ((0, 30, 75, 120, 165, 210, 255, 300, 330), 0, "process_input"),
    ],
    ids=["sv4d", "sv4d_early", "sv4d2", "sv4d2_8views"],
)
def test_videos_of_sv4d_become_a_matrix_whose_last_view_is_the_input(tmp_path, azimuths, elevation, first):
    write_sv4d(tmp_path / "out", azimuths, elevation, first)
    made = bring(tmp_path / "out", tmp_path / "run")
    assert (made.kind, made.pictures, made.fps) == ("sv4d", len(azimuths) * F, 10)
    assert_reprojects(tmp_path / "run", at)
    run = Run.open(tmp_path / "run")
    matrix = run.matrix()
    assert (matrix.views, matrix.frames, matrix.width) == (len(azimuths), F, SIZE)
    last = json.loads((tmp_path / "run" / "transforms.json").read_text())["frames"][-1]
    assert np.isclose(last["transform_matrix"][0][3], 0, atol=1e-9) and last["transform_matrix"][1][3] < 0
    stage = run.stage("generate") or {}
    assert stage["models"] and stage["imported"] == {"kind": "sv4d", "name": "out"}


def test_a_reconstruction_of_imported_videos_has_the_corrections_of_generated_pictures(tmp_path):
    write_sv4d(tmp_path / "out", (0, 60, 120, 180, 240), 0)
    bring(tmp_path / "out", tmp_path / "run")
    sets = ("iterations=4", "start_gaussians=40", "max_gaussians=60", "holdout=2", "refine_rig=false")
    result = pipeline.reconstruct(tmp_path / "run", sets=sets, device="cpu")
    assert "correct_poses: true" in (result.folder / "config.yaml").read_text()
    assert export(tmp_path / "run", ["spz"])["spz"].is_dir()


def test_of_several_samples_one_video_names_the_one_that_is_meant(tmp_path):
    for base in (0, 1):
        write_sv4d(tmp_path / "out", (0, 60, 120, 180, 240), 0, base=base)
    expect_fault(lambda: bring(tmp_path / "out", tmp_path / "run"), 3, "2 samples", "000000, 000001")
    assert bring(tmp_path / "out" / "000001_v002.mp4", tmp_path / "run").pictures == 15
    (tmp_path / "out" / "000001_v003.mp4").unlink()
    expect_fault(lambda: bring(tmp_path / "out" / "000001_v002.mp4", tmp_path / "other"), 3, "got 4")
    (tmp_path / "out" / "000001_process_input.mp4").unlink()
    expect_fault(lambda: bring(tmp_path / "out" / "000001_v002.mp4", tmp_path / "other"), 3, "the input's video")


def test_an_input_longer_than_what_sv4d_made_of_it_is_cut(tmp_path):
    """The 8-view model of SV4D 2.0 leaves out last frames that do not fill a window."""
    write_sv4d(tmp_path / "out", (0, 60, 120, 180, 240), 0)
    pictures = shots(rig([0], 0))[0]
    video(tmp_path / "out" / "000000_process_input.mp4", [*pictures, *pictures[::-1]])
    assert bring(tmp_path / "out", tmp_path / "run").pictures == 5 * F
    assert_reprojects(tmp_path / "run", at)


def test_other_elevations_and_the_other_turning_direction_are_options(tmp_path):
    write_sv4d(tmp_path / "out", (0, -60, -120, -180, -240), 20)
    bring(tmp_path / "out", tmp_path / "run", elevation_deg=20, clockwise=True)
    assert_reprojects(tmp_path / "run", at)


@pytest.mark.parametrize("has_input", [True, False])
def test_folders_of_consistent4d_stand_where_its_authors_say(tmp_path, has_input):
    names = {"eval_0": -75, "eval_1": 15, "eval_2": 105, "eval_3": 195} | ({"input": 0} if has_input else {})
    for name, pictures in zip(names, shots(rig(list(names.values()), 0, 2.0, 49.1)), strict=True):
        for f, picture in enumerate(pictures):
            images.write_png(tmp_path / "trump" / name / f"{f}.png", picture)
    made = bring(tmp_path / "trump", tmp_path / "run")
    assert made.kind == "consistent4d" and made.pictures == len(names) * F
    assert_reprojects(tmp_path / "run", at)


def test_a_clip_of_one_view_is_no_multi_view_data(tmp_path):
    images.write_png(tmp_path / "clip" / "0.png", shots(rig([0], 0))[0][0])
    expect_fault(lambda: bring(tmp_path / "clip", tmp_path / "run", "consistent4d"), 3, "d2 generate")
    expect_fault(lambda: bring(tmp_path / "clip", tmp_path / "run"), 3, "nothing known is here")


def write_videos(folder: Path) -> dict:
    placed = rig([0, 90, 200], 25)
    for v, pictures in enumerate(shots(placed)):
        video(folder / f"cam{v}.mp4", pictures)
    matrix = {"transform_matrix": placed.c2w[2][:3].tolist(), "fl_x": placed.focal, "cx": SIZE / 2}
    cameras = [
        {"file": "cam0.mp4", "azimuth_deg": 0},
        {"file": "cam1.mp4", "azimuth_deg": 90, "elevation_deg": 25},
        {"file": "cam2.mp4"} | matrix,
    ]
    meta = {"fps": 12, "fov_deg": 33.8, "elevation_deg": 25, "cameras": cameras}
    (folder / "cameras.json").write_text(json.dumps(meta))
    return meta


def test_videos_with_a_camera_file_come_in_by_angles_and_by_matrices(tmp_path):
    write_videos(tmp_path / "stage")
    made = bring(tmp_path / "stage", tmp_path / "run")
    assert (made.kind, made.pictures, made.fps) == ("videos", 3 * F, 12)
    assert_reprojects(tmp_path / "run", at)


def changed(key: str, value: object) -> Callable[[dict], None]:
    return lambda meta: meta["cameras"][1].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("file", "../cam0.mp4"), "leaves the folder"),
        (changed("file", "none.mp4"), "none.mp4 does not exist"),
        (changed("file", 3), "camera 1: expected an object with a file"),
        (changed("azimuth", 3), "unknown field 'azimuth'"),
        (changed("azimuth_deg", "left"), "azimuth_deg must be in"),
        (changed("elevation_deg", 100), "elevation_deg must be in -90..90"),
        (changed("transform_matrix", np.diag([2, 1, 1, 1]).tolist()), "must be rigid"),
        (changed("transform_matrix", [[1, "x"]]), "not a matrix of numbers"),
        (lambda meta: meta["cameras"].pop() and meta["cameras"].pop(), "2 to 1000 cameras"),
        (lambda meta: meta.__setitem__("fps", 0), "fps must be in"),
        (lambda meta: meta["cameras"][0].pop("azimuth_deg"), "neither azimuth_deg nor transform_matrix"),
    ],
)
def test_a_camera_file_that_cannot_be_is_one_line(tmp_path, change, said):
    meta = write_videos(tmp_path / "stage")
    change(meta)
    (tmp_path / "stage" / "cameras.json").write_text(json.dumps(meta))
    expect_fault(lambda: bring(tmp_path / "stage", tmp_path / "run"), 3, said, folder=tmp_path / "stage")
    assert not (tmp_path / "run").exists()


def test_a_view_with_fewer_frames_is_named(tmp_path):
    write_videos(tmp_path / "stage")
    video(tmp_path / "stage" / "cam1.mp4", shots(rig([90], 25))[0][:2])
    expect_fault(lambda: bring(tmp_path / "stage", tmp_path / "run"), 3, "cam1.mp4 has 2 frames, cam0.mp4 has 3")


# -- D-NeRF and Blender --------------------------------------------------------------------------------------


def test_a_d_nerf_scene_keeps_its_splits_times_and_cameras(tmp_path):
    scene, placed = tmp_path / "jumpingjacks", rig([10, 80, 170, 260, 300, 350], 30, 4.0, 40)
    for split, some in (("train", [0, 1, 2, 3]), ("val", [4]), ("test", [5])):
        frames = []
        for k, v in enumerate(some):
            f = k % F
            images.write_png(scene / split / f"r_{k:03d}.png", dot(placed.viewmats[v], placed.K, POINTS[f]))
            matrix = placed.c2w[v].tolist()
            name = f"./{split}/r_{k:03d}"
            frames.append({"file_path": name, "rotation": 0.1, "time": f / (F - 1), "transform_matrix": matrix})
        meta = {"camera_angle_x": placed.fov, "frames": frames}
        (scene / f"transforms_{split}.json").write_text(json.dumps(meta))
    made = bring(scene, tmp_path / "run")
    assert (made.kind, made.pictures) == ("transforms", 6)
    for split in ("train", "val", "test"):
        assert_reprojects(tmp_path / "run", at, split)
    assert dataset.load(tmp_path / "run", "test").times.tolist() == [0]
    sets = ("iterations=4", "start_gaussians=40", "max_gaussians=60", "holdout=0")
    assert pipeline.reconstruct(tmp_path / "run", sets=sets, device="cpu").model.is_file()
    (tmp_path / "run" / "images" / "train" / "00000.png").write_bytes(b"")
    expect_fault(lambda: pipeline.reconstruct(tmp_path / "run", name="b", device="cpu"), 3, "00000.png changed")


def test_pictures_of_a_dataset_come_in_with_the_same_pixels(tiny_dataset, tmp_path):
    bring(tiny_dataset, tmp_path / "run")
    before, after = dataset.load(tiny_dataset), dataset.load(tmp_path / "run")
    for name in ("images", "viewmats", "Ks", "times"):
        assert torch.allclose(getattr(before, name).float(), getattr(after, name).float(), atol=1e-6), name


# -- COLMAP --------------------------------------------------------------------------------------------------

WORLD = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0], [0.48, 0.64, 0.6]])  # COLMAP's axes: p = 2.5 W p' + (1, 2, 3)


def write_colmap(folder: Path, binary: bool, model: str = "PINHOLE", empty: bool = False) -> None:
    """A project as COLMAP's documentation lays it out: sparse/0 and images/."""
    placed = rig([0, 70, 150, 260], 20)
    registered = []
    for v, viewmat in enumerate(placed.viewmats):
        images.write_png(folder / "images" / f"cam {v}" / "0.png", dot(viewmat, placed.K, POINTS[0]))
        R, t = viewmat[:3, :3] @ WORLD.T, 2.5 * viewmat[:3, 3] - viewmat[:3, :3] @ WORLD.T @ [1, 2, 3]
        registered.append((v + 1, *quaternion(R), *t, 1, f"cam {v}/0.png"))
    f, half = placed.focal, SIZE / 2
    values = [f, f, half, half] if model == "PINHOLE" else [f, half, half] + [0.0] * (model != "SIMPLE_PINHOLE")
    place = folder / "sparse" / "0"
    place.mkdir(parents=True)
    if binary:
        number = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2}[model]
        lens = struct.pack("<QiiQQ", 1, 1, number, SIZE, SIZE) + struct.pack(f"<{len(values)}d", *values)
        (place / "cameras.bin").write_bytes(lens)
        data = struct.pack("<Q", 0 if empty else len(registered))
        for image, *pose, lens_number, name in registered[: 0 if empty else None]:
            data += struct.pack("<i7di", image, *pose, lens_number) + name.encode() + b"\0"
            data += struct.pack("<Q", 2) + struct.pack("<ddq", 1, 2, -1) * 2
        (place / "images.bin").write_bytes(data)
        return
    words = " ".join(map(repr, values))
    text = f"# Camera list with one line of data per camera:\n#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n1 {model}"
    (place / "cameras.txt").write_text(f"{text} {SIZE} {SIZE} {words}\n")
    lines = [
        "# Image list with two lines of data per image:",
        "#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME",
    ]
    for k, image in enumerate(registered[: 0 if empty else None]):
        lines += [" ".join(map(str, image)), "1.0 2.0 -1 3.0 4.0 7" if k % 2 else ""]
    (place / "images.txt").write_text("\n".join(lines) + "\n")


def quaternion(R: np.ndarray) -> list[float]:
    from d2.recon.gaussians import quaternions

    return quaternions(torch.from_numpy(R)[None])[0].tolist()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("model", ["PINHOLE", "SIMPLE_PINHOLE"])
def test_a_colmap_model_comes_in_upright_and_its_points_project_as_before(tmp_path, binary, model):
    write_colmap(tmp_path / "project", binary, model)
    made = bring(tmp_path / "project", tmp_path / "run")
    assert (made.kind, made.pictures) == ("colmap", 4)
    S = np.array((Run.open(tmp_path / "run").stage("import") or {})["similarity"])
    original = 2.5 * WORLD @ POINTS[0] + [1, 2, 3]  # in COLMAP's axes
    assert_reprojects(tmp_path / "run", lambda time: S[:3, :3] @ original + S[:3, 3])
    data = dataset.load(tmp_path / "run")
    up = -data.viewmats[:, 1, :3].mean(0)
    assert up[2] / up.norm() > 0.99 and data.camera_centres()[:, 2].min() > 0
    assert torch.isclose(data.camera_centres().norm(dim=1).median(), torch.tensor(camera.DEFAULT_RADIUS), rtol=0.05)
    assert abs(data.camera_centres()[0, 0]) < 1e-4 and data.camera_centres()[0, 1] < 0


def test_masks_beside_a_colmap_project_become_alpha(tmp_path):
    write_colmap(tmp_path / "project", True)
    for v in range(4):
        mask = images.read_rgba(tmp_path / "project" / "images" / f"cam {v}" / "0.png")[0][..., 3]
        images.write_png(tmp_path / "project" / "masks" / f"cam {v}" / "0.png.png", mask // 2)
    bring(tmp_path / "project", tmp_path / "run")
    assert dataset.load(tmp_path / "run").images[..., 3].max() == 127


def test_lenses_that_bend_lines_and_damaged_models_are_one_line(tmp_path):
    for binary in (True, False):
        write_colmap(tmp_path / f"radial{binary}", binary, "SIMPLE_RADIAL")
        expect_fault(lambda b=binary: bring(tmp_path / f"radial{b}", tmp_path / "run"), 3, "image_undistorter")
        write_colmap(tmp_path / f"empty{binary}", binary, empty=True)
        expect_fault(lambda b=binary: bring(tmp_path / f"empty{b}", tmp_path / "run"), 3, "no registered image")
    write_colmap(tmp_path / "p", True)
    (tmp_path / "p" / "images" / "cam 2" / "0.png").unlink()
    expect_fault(lambda: bring(tmp_path / "p", tmp_path / "run"), 3, "cam 2/0.png", "does not exist")


@pytest.mark.parametrize("binary", [True, False])
def test_mutated_colmap_models_raise_nothing_undocumented(tmp_path, binary):
    write_colmap(tmp_path / "p", binary)
    place = tmp_path / "p" / "sparse" / "0"
    rng = np.random.default_rng(0)
    suffix = ".bin" if binary else ".txt"
    for name in ("cameras", "images"):
        whole = (place / f"{name}{suffix}").read_bytes()
        for trial in range(200):
            data = bytearray(whole if trial % 3 else whole[: rng.integers(len(whole))])
            for _ in range(rng.integers(1, 4)):
                if data:
                    data[rng.integers(len(data))] = rng.integers(256)
            (place / f"{name}{suffix}").write_bytes(data)
            try:
                colmap.read_model(place)
            except D2Error as error:
                assert error.exit_code == 3
        (place / f"{name}{suffix}").write_bytes(whole)


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_says_what_came_and_what_is_next(d2, tiny_dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    outcome = d2("import", tiny_dataset, "--quiet", "--fps", "12")
    assert outcome.code == 0 and "runs/balls: 27 pictures from transforms, 12 frames a second" in outcome.stdout
    assert "Next: d2 reconstruct runs/balls" in outcome.stdout
    expect_fault(lambda: d2("import", tiny_dataset), 8, "runs/balls is a run already")
    asked = json.loads(d2("import", tiny_dataset, "--out", "b", "--from", "transforms", "--quiet", "--json").stdout)
    assert asked == {"folder": "b", "kind": "transforms", "pictures": 27, "gaussians": 0, "fps": 24.0}


def test_what_cannot_be_imported_is_one_line(d2, tiny_dataset, tmp_path):  # noqa: F811
    expect_fault(lambda: d2("import", tmp_path / "none"), 3, "does not exist")
    expect_fault(lambda: d2("import", tiny_dataset, "--from", "nerf"), 3, "expected one of sv4d")
    expect_fault(lambda: d2("import", tiny_dataset, "--out", tiny_dataset), 3, "is not written to", folder=tiny_dataset)
    expect_fault(lambda: d2("import", tiny_dataset / "transforms_train.json"), 3, "is a file")
    for words in (("--fps", "0"), ("--fov-deg", "180"), ("--elevation-deg", "91")):
        expect_fault(lambda words=words: d2("import", tiny_dataset, *words), 3, "must be in")


def test_an_interrupted_import_begins_again(tiny_dataset, tmp_path, monkeypatch):
    whole = images.write_png
    monkeypatch.setattr(
        images, "write_png", lambda path, array: whole(path, array) if "00003" not in path.name else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        bring(tiny_dataset, tmp_path / "run")
    monkeypatch.setattr(images, "write_png", whole)
    expect_fault(lambda: pipeline.reconstruct(tmp_path / "run", device="cpu"), 8, "no finished matrix")
    assert bring(tiny_dataset, tmp_path / "run", fps=30).pictures == 27
    assert Run.open(tmp_path / "run").fps == 30
