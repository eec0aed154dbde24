"""Loading run folders and foreign transforms.json datasets: layouts, sizes, and one clear line for each fault."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from d2 import camera
from d2.errors import InputError
from d2.recon import dataset

SIZE = 16


def write(folder, *, count=4, mode="RGBA", suffix=".png", meta=None, entry=None, name="transforms.json"):
    """A dataset of `count` orbit cameras whose images are a disc before nothing (or white)."""
    rig = camera.orbit(count, width=SIZE, height=SIZE)
    v, u = np.mgrid[:SIZE, :SIZE]
    disc = ((u - 8) ** 2 + (v - 8) ** 2 < 20)[..., None]
    rgba = np.where(disc, [200, 50, 25, 255], [0, 0, 0, 0]).astype(np.uint8)
    if mode == "RGB":
        rgba = np.where(disc, [200, 50, 25], [255, 255, 255]).astype(np.uint8)
    frames = []
    for k in range(count):
        path = f"images/{k:03d}{suffix}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgba).save(folder / f"images/{k:03d}.png")
        frames.append({"file_path": path, "transform_matrix": rig.c2w[k].tolist(), "time": k / max(count - 1, 1)})
        frames[-1] |= entry(k) if entry else {}
    content = {"fl_x": rig.focal, "fl_y": rig.focal, "cx": 8, "cy": 8, "w": SIZE, "h": SIZE} if meta is None else meta
    (folder / name).write_text(json.dumps(content | {"frames": frames}))
    return folder


def drop_none(folder, name="transforms.json"):
    """Removes entries that a test set to None."""
    meta = json.loads((folder / name).read_text())
    meta["frames"] = [{k: v for k, v in e.items() if v is not None} for e in meta["frames"]]
    (folder / name).write_text(json.dumps(meta))
    return folder


def test_rgba_dataset_is_premultiplied_with_cameras_in_opencv_axes(tmp_path):
    data = dataset.load(write(tmp_path))
    assert data.images.shape == (4, SIZE, SIZE, 4) and data.has_alpha
    assert data.images[0, 0, 0].tolist() == [0, 0, 0, 0] and data.images[0, 8, 8].tolist() == [200, 50, 25, 255]
    origin = data.viewmats[:, :3, 3]
    torch.testing.assert_close(origin, torch.tensor([[0, 0, 3.7]]).expand(4, 3), atol=1e-5, rtol=0)
    assert data.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert data.views.tolist() == [0, 1, 2, 3]


def test_size_filters_in_premultiplied_alpha_and_scales_the_intrinsics(tmp_path):
    data = dataset.load(write(tmp_path), size=8)
    full = dataset.load(tmp_path)
    assert data.images.shape[1:3] == (8, 8)
    torch.testing.assert_close(data.Ks[:, 0, 0], full.Ks[:, 0, 0] / 2)
    torch.testing.assert_close(data.Ks[:, 0, 2], torch.full((4,), 4.0))
    means = full.images.float().view(4, 8, 2, 8, 2, 4).mean((2, 4))
    torch.testing.assert_close(data.images.float(), means, atol=0.51, rtol=0)


def test_blender_layout_with_camera_angle_and_no_suffix(tmp_path):
    angle = 2 * math.atan(0.5)
    data = dataset.load(write(tmp_path, meta={"camera_angle_x": angle}, suffix=""))
    torch.testing.assert_close(data.Ks[:, 0, 0], torch.full((4,), float(SIZE)))
    assert data.Ks[0, 1, 2] == 8


def test_intrinsics_of_a_frame_come_before_those_of_the_file(tmp_path):
    data = dataset.load(write(tmp_path, entry=lambda k: {"fl_x": 10 + k, "fl_y": 20}))
    assert data.Ks[:, 0, 0].tolist() == [10, 11, 12, 13] and data.Ks[0, 1, 1] == 20


def test_intrinsics_follow_the_size_the_images_are_stored_at(tmp_path):
    write(tmp_path)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    doubled = meta | {k: 2 * meta[k] for k in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    before = dataset.load(tmp_path).Ks
    (tmp_path / "transforms.json").write_text(json.dumps(doubled))
    torch.testing.assert_close(dataset.load(tmp_path).Ks, before)


def test_no_time_anywhere_is_a_static_scene(tmp_path):
    data = dataset.load(drop_none(write(tmp_path, entry=lambda k: {"time": None})))
    assert data.times.unique().tolist() == [0] and data.frames == 1


def test_masks_give_alpha_to_rgb_images(tmp_path):
    write(tmp_path, mode="RGB", entry=lambda k: {"mask_path": "mask.png"})
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    data = dataset.load(tmp_path)
    assert data.has_alpha and data.images[0, :, 0, 3].tolist() == [0] * 4 + [255] * 4 + [0] * 8


def test_plain_rgb_has_the_background_of_its_borders(tmp_path):
    data = dataset.load(write(tmp_path, mode="RGB"))
    assert not data.has_alpha and data.background.tolist() == [1, 1, 1]


def test_train_and_test_files_are_found_by_split(tmp_path):
    write(tmp_path, name="transforms_train.json")
    write(tmp_path, name="transforms_test.json", count=2)
    assert len(dataset.load(tmp_path, "train")) == 4 and len(dataset.load(tmp_path, "test")) == 2
    assert len(dataset.load(tmp_path / "transforms_test.json")) == 2


def test_three_by_four_matrices_are_accepted(tmp_path):
    full = dataset.load(write(tmp_path)).viewmats
    meta = json.loads((tmp_path / "transforms.json").read_text())
    for entry in meta["frames"]:
        entry["transform_matrix"] = entry["transform_matrix"][:3]
    (tmp_path / "transforms.json").write_text(json.dumps(meta))
    torch.testing.assert_close(dataset.load(tmp_path).viewmats, full)


SCALED = (2 * np.eye(4)).tolist()
MIRRORED = np.diag([-1.0, 1, 1, 1]).tolist()
SINGULAR = np.diag([1.0, 1, 0, 1]).tolist()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"transform_matrix": SCALED}, "frame 2: transform_matrix is not rigid"),
        ({"transform_matrix": MIRRORED}, "frame 2: transform_matrix mirrors"),
        ({"transform_matrix": SINGULAR}, "frame 2: transform_matrix is not rigid"),
        ({"transform_matrix": [[1, 2], [3]]}, "frame 2: transform_matrix is not a matrix"),
        ({"transform_matrix": "x"}, "frame 2: transform_matrix"),
        ({"transform_matrix": None}, "frame 2: transform_matrix must be 4×4"),
        ({"time": 7}, r"frame 2: time must be in 0..1, got 7"),
        ({"time": None}, "frame 2: time must be in"),
        ({"time": "0"}, "frame 2: time must be in"),
        ({"file_path": "images/none.png"}, "frame 2: no image at"),
        ({"file_path": "../secret.png"}, "frame 2: path '../secret.png' leaves"),
        ({"file_path": "/etc/passwd"}, "frame 2: path '/etc/passwd' must be relative"),
        ({"file_path": 3}, "frame 2: file_path must be text"),
        ({"fl_x": 0}, "frame 2: fl_x must be a positive number, got 0"),
        ({"fl_x": True}, "frame 2: fl_x must be a positive number"),
        ({"w": 32, "h": 16}, r"frame 2: w × h is 32×16 but the image is 16×16"),
    ],
)
def test_a_bad_frame_is_named_with_its_reason(tmp_path, entry, message):
    write(tmp_path, entry=lambda k: entry if k == 2 else {})
    with pytest.raises(InputError, match=message):
        dataset.load(drop_none(tmp_path) if None in entry.values() and "transform_matrix" not in entry else tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"frames": []}, "expected a list of frames"),
        ({"frames": {"a": 1}}, "expected a list of frames"),
        ({"k1": 0.1}, "lens distortion k1"),
        ({"camera_model": "OPENCV_FISHEYE"}, "not a pinhole camera"),
        ({"fl_x": None}, "neither fl_x nor camera_angle_x"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, meta, message):
    write(tmp_path)
    content = json.loads((tmp_path / "transforms.json").read_text()) | meta
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        dataset.load(tmp_path)


def test_images_of_different_sizes_are_refused(tmp_path):
    write(tmp_path)
    Image.new("RGBA", (8, 8)).save(tmp_path / "images/001.png")
    with pytest.raises(InputError, match="frame 1 differs in size from frame 0"):
        dataset.load(tmp_path)


def test_poses_of_one_camera_at_many_times_share_a_view(tmp_path):
    rig = camera.orbit(4, width=SIZE, height=SIZE)
    data = dataset.load(write(tmp_path, entry=lambda k: {"transform_matrix": rig.c2w[k % 2].tolist()}))
    assert data.views.tolist() == [0, 1, 0, 1]


def test_half_resolution_is_the_area_filter_with_halved_intrinsics(tmp_path):
    full = dataset.load(write(tmp_path))
    half, filtered = full.halved(), dataset.load(tmp_path, size=SIZE // 2)
    torch.testing.assert_close(half.Ks, filtered.Ks)
    assert (half.images.int() - filtered.images.int()).abs().max() <= 1
    odd = dataset.load(tmp_path, size=7)
    assert odd.halved() is odd
