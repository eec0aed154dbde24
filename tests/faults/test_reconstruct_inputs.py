"""Bad input, bad settings and bad days of `reconstruct`: one clear line or the right result, and nothing lost."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from faults.assertions import expect_fault
from faults.tiny import tiny_reconstruct
from PIL import Image

from d2 import fileio, images
from d2.errors import InputError
from d2.recon import dataset, pipeline


@pytest.fixture
def edit(tiny_dataset):
    """Changes transforms_train.json of the tiny dataset: `edit(lambda meta: ...)`."""

    def change(action) -> Path:
        file = tiny_dataset / "transforms_train.json"
        meta = json.loads(file.read_text())
        action(meta)
        file.write_text(json.dumps(meta))
        return tiny_dataset

    return change


# -- where the input is ------------------------------------------------------------------------------------


@pytest.mark.row(1)
@pytest.mark.parametrize("name", ["absent", "line\nbreak", "-leading", "with space", "a" * 300, "ünï"])
def test_row_1_a_path_that_does_not_exist_is_named_and_nothing_is_created(tmp_path, name):
    expect_fault(lambda: tiny_reconstruct(tmp_path / name, tmp_path / "out"), 3, "does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.row(2)
def test_row_2_a_folder_without_cameras_says_what_it_lacks(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    expect_fault(lambda: tiny_reconstruct(tmp_path, tmp_path / "out"), 3, "transforms.json", folder=tmp_path)


@pytest.mark.row(4)
@pytest.mark.parametrize("content", [b"", b"just text", b"<html></html>"])
def test_row_4_a_file_that_is_no_image_is_named(tiny_dataset, tmp_path, content):
    (tiny_dataset / "train" / "v01_f002.png").write_bytes(content)
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 3, "v01_f002.png", folder=tiny_dataset)


@pytest.mark.row(7)
def test_row_7_images_without_any_foreground_are_refused(tiny_dataset, tmp_path):
    for path in (tiny_dataset / "train").iterdir():
        images.write_png(path, np.zeros((32, 32, 4), np.uint8))
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 3, "no foreground", folder=tiny_dataset)


@pytest.mark.row(9)
def test_row_9_the_first_image_of_another_size_is_named(tiny_dataset, tmp_path):
    for name in ("v02_f001.png", "v03_f001.png"):
        images.write_png(tiny_dataset / "train" / name, np.full((16, 16, 4), 255, np.uint8))
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 3, "frame 9", "v02_f001.png")


@pytest.mark.row(12)
def test_row_12_a_fifo_a_folder_and_a_loop_in_place_of_images_never_block(edit, tmp_path):
    folder = edit(lambda meta: meta["frames"][0].update(file_path="train/odd.png"))
    odd = folder / "train" / "odd.png"
    for make in (lambda: os.mkfifo(odd), odd.mkdir, lambda: odd.symlink_to("odd.png")):
        make()
        expect_fault(lambda: tiny_reconstruct(folder, tmp_path / "o"), 3, "frame 0", "odd.png")
        fileio.remove(odd)


@pytest.mark.row(13)
@pytest.mark.parametrize("name", ["with space.png", "ünï çødé.png", "line\nbreak.png", "-leading.png", "%s{0}.png"])
def test_row_13_any_file_name_is_fine(edit, tmp_path, name):
    folder = edit(lambda meta: meta["frames"][0].update(file_path=f"train/{name}"))
    (folder / "train" / "v00_f000.png").rename(folder / "train" / name)
    assert len(dataset.load(folder)) == 24
    (folder / "train" / name).write_bytes(b"")
    message = expect_fault(lambda: tiny_reconstruct(folder, tmp_path / "o"), 3, "is not a readable image")
    assert message.isprintable()


# -- settings ----------------------------------------------------------------------------------------------


@pytest.mark.row(15, 17, 19, 22)
@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("iterationz=3", "did you mean iterations"), ("iterations=0", "greater than or equal to 1"),
        ("iterations=-1", "greater"), ("iterations=1000000000", "less than or equal to"), ("lr_means=.nan", "finite"),
        ("seed=-1", "greater"), (f"seed={2**70}", "less than"), ("ssim_weight=1.5", "less than or equal to 1"),
        ("holdout=!!python/object/apply:os.getcwd []", "not valid YAML"), ("size=1.5", "integer"),
    ],
)  # fmt: skip
def test_rows_15_to_22_settings_out_of_their_range_stop_before_anything_is_created(
    tiny_dataset, tmp_path, setting, text
):
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o", setting), 3, text)
    assert not (tmp_path / "o").exists()


@pytest.mark.row(17)
def test_row_17_a_preset_file_runs_no_code(tiny_dataset, tmp_path):
    (tmp_path / "p.yaml").write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/pwned']")
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o", preset=str(tmp_path / "p.yaml")), 3, "p.yaml")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a\nb", "a" * 200, "a:b", "\ud800"])
def test_a_name_that_is_no_plain_file_name_is_refused(tiny_dataset, tmp_path, name):
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o", name=name), 3, "plain file name")


@pytest.mark.row(60)
@pytest.mark.parametrize(("device", "code"), [("cuda:99", 4), ("meta", 3), ("gpu", 3), ("", 3), ("cpu:x", 3)])
def test_row_60_a_device_that_is_not_there_is_named(tiny_dataset, tmp_path, device, code):
    expect_fault(lambda: pipeline.reconstruct(tiny_dataset, tmp_path / "o", device=device), code, "--device")


# -- transforms.json ---------------------------------------------------------------------------------------

BAD_FRAMES = {
    "scaled": (lambda e: e.update(transform_matrix=(2 * np.eye(4)).tolist()), "not rigid"),
    "mirrored": (lambda e: e.update(transform_matrix=np.diag([1.0, 1, -1, 1]).tolist()), "mirrors"),
    "singular": (lambda e: e.update(transform_matrix=np.zeros((4, 4)).tolist()), "not rigid"),
    "3x3": (lambda e: e.update(transform_matrix=np.eye(3).tolist()), "4×4"),
    "ragged": (lambda e: e.update(transform_matrix=[[1], [2, 3]]), "matrix of numbers"),
    "text": (lambda e: e.update(transform_matrix="eye"), "matrix of numbers"),
    "none": (lambda e: e.pop("transform_matrix"), "4×4"),
    "integer overflow": (lambda e: e["transform_matrix"][0].__setitem__(3, 10**400), "matrix of numbers"),
    "farther than float32": (lambda e: e["transform_matrix"][0].__setitem__(3, 1e300), "finite and within"),
    "last row": (lambda e: e["transform_matrix"].__setitem__(3, [0, 0, 1, 1]), "last row"),
    "time 7": (lambda e: e.update(time=7), "time must be in 0..1"),
    "time text": (lambda e: e.update(time="0"), "time must be in 0..1"),
    "time only sometimes": (lambda e: e.pop("time"), "time must be in 0..1, got None"),
    "focal 0": (lambda e: e.update(fl_x=0), "fl_x must be a positive number"),
    "focal huge": (lambda e: e.update(fl_x=10**400), "fl_x must be a positive number"),
    "focal text": (lambda e: e.update(fl_x="40"), "fl_x must be a positive number"),
    "other shape": (lambda e: e.update(w=32, h=64), "the image is 32×32"),
    "distorted": (lambda e: e.update(k1=0.1), "undistort"),
    "absent": (lambda e: e.update(file_path="train/none"), "no image at"),
    "outside": (lambda e: e.update(file_path="../../secret.png"), "leaves the folder"),
    "absolute": (lambda e: e.update(file_path="/etc/hostname"), "relative"),
    "no path": (lambda e: e.pop("file_path"), "file_path must be text"),
    "path of a number": (lambda e: e.update(file_path=3), "file_path must be text"),
    "path of a folder": (lambda e: e.update(file_path="."), "no image at"),
    "path no system has": (lambda e: e.update(file_path="\ud800"), ""),
    "path too long": (lambda e: e.update(file_path="a" * 5000), "no image at"),
    "mask absent": (lambda e: e.update(mask_path="train/none.png"), "none.png"),
    "mask null": (lambda e: e.update(mask_path=None), "mask_path must be text"),
}


@pytest.mark.row(37)
@pytest.mark.parametrize("fault", BAD_FRAMES)
def test_row_37_a_bad_frame_is_named_with_its_index_and_reason(edit, tmp_path, fault):
    change, reason = BAD_FRAMES[fault]
    folder = edit(lambda meta: change(meta["frames"][5]))
    where = "frame 5" if fault not in ("mask absent", "distorted") else ""
    expect_fault(lambda: tiny_reconstruct(folder, tmp_path / "o"), 3, where, reason, folder=folder)


@pytest.mark.row(37)
@pytest.mark.parametrize("frames", [[], {}, None, 3, ["a"], [None]])
def test_row_37_a_file_without_frames_is_refused(edit, tmp_path, frames):
    folder = edit(lambda meta: meta.update(frames=frames))
    expect_fault(lambda: tiny_reconstruct(folder, tmp_path / "o"), 3, "list of frames")


@pytest.mark.row(37)
def test_row_37_one_frame_or_one_pose_is_too_little(edit, tmp_path):
    folder = edit(lambda meta: meta.update(frames=meta["frames"][:1]))
    expect_fault(lambda: tiny_reconstruct(folder, tmp_path / "o"), 3, "one camera pose")


@pytest.mark.row(37)
def test_row_37_without_times_the_scene_is_static_and_3x4_poses_are_read(edit):
    def change(meta):
        for entry in meta["frames"]:
            del entry["time"]
            entry["transform_matrix"] = entry["transform_matrix"][:3]

    data = dataset.load(edit(change))
    assert data.frames == 1 and len(data.views.unique()) == 6


@pytest.mark.row(37)
def test_row_37_an_angle_of_view_out_of_range_is_refused(edit, tmp_path):
    for angle in (0, -1, 4, 5e-324, "1"):
        folder = edit(lambda meta, angle=angle: meta.update(camera_angle_x=angle))
        expect_fault(lambda: tiny_reconstruct(folder, tmp_path / "o"), 3, "camera_angle_x")  # noqa: B023


@pytest.mark.row(38)
def test_row_38_a_blender_dataset_without_suffixes_gives_the_same_data(tiny_dataset, edit):
    before = dataset.load(tiny_dataset)

    def blender(meta):
        meta["frames"] = [e | {"file_path": "./" + e["file_path"].removesuffix(".png")} for e in meta["frames"]]
        del meta["w"], meta["h"]

    assert dataset.load(edit(blender)).digest() == before.digest()


@pytest.mark.row(38)
def test_row_38_rgb_images_with_masks_are_read_like_rgba(tiny_dataset, edit):
    before = dataset.load(tiny_dataset)

    def masked(meta):
        for entry in meta["frames"]:
            path = tiny_dataset / entry["file_path"]
            rgba = np.asarray(Image.open(path))
            images.write_png(path.with_suffix(".mask.png"), rgba[..., 3])
            images.write_png(path, rgba[..., :3])
            entry["mask_path"] = entry["file_path"].replace(".png", ".mask.png")

    data = dataset.load(edit(masked))
    assert data.has_alpha and data.digest() == before.digest()


@pytest.mark.row(37)
def test_300_mutations_of_transforms_only_ever_give_an_input_error(tiny_dataset):
    file = tiny_dataset / "transforms_train.json"
    meta = json.loads(file.read_text())
    meta["frames"] = meta["frames"][:3]
    original, rng, refused = json.dumps(meta).encode(), random.Random(0), 0
    pieces = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b"[]",
        b"{}",
        b'"x"',
        b"1" * 400,
        b"\xff",
        b"\0",
        b",",
        b'"',
        b"../",
        b"0",
    ]
    for _ in range(300):
        data = bytearray(original)
        a = rng.randrange(len(data))
        data[a : a + rng.choice([0, 1, 4, 30])] = rng.choice([*pieces, bytes([rng.randrange(256)])])
        file.write_bytes(data)
        try:
            dataset.load(tiny_dataset)
        except InputError:
            refused += 1
    assert refused > 100
