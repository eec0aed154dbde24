import hashlib
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest

from d2 import camera, fileio, images, toybox, toyrender, toys
from d2.errors import ConflictError, InputError
from d2.recon import dataset
from d2.toybox import Split, render, sample_toy
from d2.toyrender import BOX, CAPSULE, ELLIPSOID, PATCH, PLAIN, STRIPES, TWO_TONE, Parts

TEN_DEG = math.radians(10)
RIG = camera.orbit(8, width=64, height=64)
MOTIONS = get_args(toys.Motion)
PATTERNS = [(PLAIN, 0.0), (STRIPES, 4.0), (PATCH, 0.6), (TWO_TONE, -0.2)]
SHAPES = [(ELLIPSOID, (0.5, 0.3, 0.4)), (CAPSULE, (0.2, 0.2, 0.4)), (BOX, (0.4, 0.2, 0.5))]
DIGEST = """
import hashlib
from d2 import camera, toybox
pictures = toybox.matrix(toybox.sample_toy("validation", 3), camera.orbit(2, width=32, height=32), 3)
print(hashlib.sha256(pictures.tobytes()).hexdigest())
"""


def front(toy: toys.Toy, phases: float | list[float] = 0.0, size: int = 64, **more) -> np.ndarray:  # [N, 4, H, W]
    return render(toy, np.array(phases), 0.0, TEN_DEG, size, **more)


def solid(kind: int, half: tuple, pattern: int = PLAIN, extent: float = 0.0, centre: tuple = (0, 0, 0)) -> Parts:
    inks = [[(0.8, 0.3, 0.2), (0.1, 0.4, 0.9)]]
    return Parts(
        np.array([kind]), np.array([0]), np.array([centre], float), np.array([half], float), np.array([pattern]),
        np.array([extent]), np.array(inks),
    )  # fmt: skip


@pytest.fixture
def ball_instead_of_toy(monkeypatch):
    """Any toy is drawn as one small ball; returns where it is."""
    centre = np.array([0.45, -0.3, 0.25])
    parts = solid(ELLIPSOID, (0.05, 0.05, 0.05), centre=tuple(centre))
    monkeypatch.setattr(toybox, "_built", lambda toy: (parts, 1.0, 0.0))
    return centre


def test_toys_and_pictures_are_the_same_every_time_in_any_process():
    rig = camera.orbit(2, width=32, height=32)
    digests = set()
    for _ in range(2):
        pictures = toybox.matrix(sample_toy("validation", 3), rig, 3)
        digests.add(hashlib.sha256(pictures.tobytes()).hexdigest())
        toybox._built.cache_clear()
    elsewhere = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert digests == {elsewhere.stdout.strip()}


def test_splits_share_no_toy():
    drawn = [sample_toy(split, index) for split in get_args(Split) for index in range(300)]
    assert len({replace(toy, fill=0.0, amplitude=1.0) for toy in drawn}) == len(drawn)


@pytest.mark.parametrize(("split", "index"), [("trian", 0), ("train", -1)])
def test_toys_that_are_not_there_are_refused(split, index):
    with pytest.raises(InputError, match="expected 0 or more, of train, validation, test"):
        sample_toy(split, index)


def test_every_kind_of_everything_is_drawn_from_the_box():
    drawn = [sample_toy("train", index) for index in range(200)]
    for name in ("motion", "shape", "hat", "ears", "prop", "body_pattern", "arm_pattern", "leg_pattern"):
        assert {getattr(toy, name) for toy in drawn} == set(get_args(get_type_hints(toys.Toy)[name]))


def test_toys_are_seen_by_the_cameras_that_a_run_writes_down(tmp_path, ball_instead_of_toy):
    toy = replace(sample_toy("test", 0), motion="twist", yaw=0.0)
    folder = tmp_path / "run"
    toybox.write_dataset(toy, folder, views=5, frames=1, size=64, elevation_deg=25)
    written = fileio.read_json(folder / "transforms.json")
    focal, middle = written["fl_x"], [written["cx"], written["cy"]]
    for cell in written["frames"]:
        x, y, z, _ = camera.viewmats(np.array(cell["transform_matrix"])) @ [*ball_instead_of_toy, 1]
        alpha = images.read_rgba(folder / cell["file_path"])[0][..., 3] / 255.0
        rows, columns = np.indices(alpha.shape) + 0.5
        found = np.array([(alpha * columns).sum(), (alpha * rows).sum()]) / alpha.sum()
        np.testing.assert_allclose(found, [focal * x / z + middle[0], focal * y / z + middle[1]], atol=0.2)


def test_another_radius_and_field_of_view_change_the_picture_as_a_camera_would(ball_instead_of_toy):
    rig = camera.orbit(3, radius=5.0, fov_deg=50, width=96, height=96)
    pictures = toybox.column(replace(sample_toy("test", 0), motion="twist", yaw=0.0), 0.0, rig)
    for view, alpha in zip(rig.viewmats, pictures[:, 3], strict=True):
        x, y, z = (rig.K @ (view @ [*ball_instead_of_toy, 1])[:3]).tolist()
        rows, columns = np.nonzero(alpha)
        np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], [x / z, y / z], atol=0.5)


def test_colours_are_on_white_and_alpha_is_coverage():
    picture = front(sample_toy("train", 0), size=96)[0]
    rgb, alpha = picture[:3], picture[3]
    assert (rgb[:, alpha == 0] == 1).all() and picture.min() >= 0 and picture.max() <= 1
    assert (rgb >= 1 - alpha - 1e-6).all()  # what is left of the white behind
    assert (alpha == 1).any()


def test_edges_are_smooth_with_more_rays_and_hard_with_one():
    toy = sample_toy("train", 0)
    hard, default, smooth = (front(toy, size=48, samples=n)[0, 3] for n in (1, 2, 8))
    assert set(np.unique(hard)) == {0, 1} and set(np.unique(default)) == {0, 0.25, 0.5, 0.75, 1}
    assert np.abs(default - smooth).mean() < 0.5 * np.abs(hard - smooth).mean()


@pytest.mark.parametrize("index", range(8))
def test_every_motion_can_be_told_from_the_first_picture(index):
    toy = sample_toy("validation", index)
    firsts = [front(replace(toy, motion=motion))[0] for motion in MOTIONS]
    for one, other in itertools.combinations(firsts, 2):
        assert np.abs(one - other).mean() > 0.008  # some 130 of the 4 × 64² numbers from 0 to 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_amplitude_leaves_the_first_picture_and_scales_the_motion(motion):
    toy = replace(sample_toy("train", 5), motion=motion)
    still, little, much = (front(toy.moved(amplitude), [0.0, 0.3, 0.75]) for amplitude in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(still[0], much[0])
    np.testing.assert_array_equal(still[1], still[0])
    assert 0 < np.abs(little[1:] - still[1:]).mean() < np.abs(much[1:] - still[1:]).mean()


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_repeat_with_period_one(motion):
    toy = replace(sample_toy("train", 6), motion=motion)
    np.testing.assert_array_equal(front(toy, [0.0, 0.375]), front(toy, [1.0, 2.375]))
    beside = front(toy, [0.0, 1e-4, 1 - 1e-4])
    assert np.abs(beside[1:] - beside[0]).mean() < 1e-3


def test_toys_stay_within_the_picture_from_every_side():
    for index in range(100):
        toy = sample_toy("train", index)
        alpha = toybox.matrix(toy.moved(1.2), RIG, 8, size=48)[:, :, 3]
        border = alpha[..., [0, -1], :].sum() + alpha[..., [0, -1]].sum()
        assert border == 0, f"{index}: {toy}"


def test_toys_fill_the_picture_and_are_centred_at_phase_zero():
    for index in range(30):
        toy = sample_toy("train", index)
        rows = np.flatnonzero(front(toy, size=128)[0, 3].any(1))
        assert (rows[-1] + 1 - rows[0]) / 128 == pytest.approx(toy.fill, abs=0.02)
        assert (rows[-1] + 1 + rows[0]) / 256 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_patterns_turn_with_their_part(shape, pattern):
    """A part that has turned looks, to a camera that has gone round with it, as before, but for the light."""

    def hue(turn: float, azimuth: float) -> np.ndarray:
        rig = replace(RIG, azimuth=np.array([azimuth]), elevation=np.array([0.2]))
        turns = toys._rotations(np.array([[[0, 0, turn]]])) @ toys._rotations(np.array([0.5, 0.3, 0]))
        picture = toyrender.draw(solid(*shape, *pattern), turns, np.zeros((1, 1, 3)), rig.viewmats, 100.0, 64, 1)[0, :3]
        return picture / picture.sum(0)

    np.testing.assert_allclose(hue(1.9, 1.9), hue(0, 0), atol=1e-5)
    assert np.abs(hue(1.9, 0) - hue(0, 0)).max() > 0.1


def test_body_turns_to_its_left_and_back_in_a_twist():
    toy = replace(sample_toy("train", 1), motion="twist", yaw=0.0)
    ahead, turned = toybox.pose(toy.moved(1.0), np.array([0.0, 0.25]))[0][:, toys.TORSO]
    np.testing.assert_allclose(turned @ ahead.T @ [0, -1, 0], [math.sin(0.65), -math.cos(0.65), 0], atol=1e-12)


def test_column_and_row_are_those_of_the_matrix():
    toy = sample_toy("test", 2)
    whole = toybox.matrix(toy, RIG, 4, size=32)
    assert whole.shape == (8, 4, 4, 32, 32) and whole.dtype == np.float32
    np.testing.assert_array_equal(toybox.column(toy, 0.5, RIG, size=32), whole[:, 2])
    np.testing.assert_array_equal(toybox.row(toy, RIG, 3, 4, size=32), whole[3])
    np.testing.assert_array_equal(front(toy, size=32)[0], whole[-1, 0])


def test_rig_that_is_not_square_is_refused():
    with pytest.raises(InputError, match="64×48"):
        toybox.matrix(sample_toy("test", 0), camera.orbit(2, width=64, height=48), 2)


def test_straight_alpha_pictures_on_white_are_the_pictures_again():
    picture = front(sample_toy("train", 8))
    rgba = toybox.straight_rgba(picture)
    assert rgba.shape == (1, 64, 64, 4) and rgba.dtype == np.uint8
    alpha = rgba[..., 3:] / 255.0
    again = rgba[..., :3] / 255.0 * alpha + 1 - alpha
    np.testing.assert_allclose(again, np.moveaxis(picture[:, :3], 1, -1), atol=1 / 255)


def test_dataset_is_a_run_that_reconstruct_takes(tmp_path):
    toy = sample_toy("test", 1)
    run = toybox.write_dataset(toy, tmp_path / "toy", views=3, frames=4, size=32, fps=8)
    whole = toybox.matrix(toy, camera.orbit(3, width=32, height=32), 4)
    np.testing.assert_array_equal(run.matrix()[1, 2], toybox.straight_rgba(whole[1, 2]))
    loaded = dataset.load(tmp_path / "toy")
    assert len(loaded.images) == 12 and loaded.has_alpha and run.fps == 8
    with pytest.raises(ConflictError):
        toybox.write_dataset(toy, tmp_path / "toy", views=3, frames=4, size=32)


# The kernel's slow twin: it marches along every ray and knows of a solid only whether a point lies in it.


def level(kind: int, half: np.ndarray, p: np.ndarray) -> np.ndarray:  # [..., 3] -> [...], below 1 inside
    if kind == ELLIPSOID:
        return ((p / half) ** 2).sum(-1)
    if kind == BOX:
        return np.abs(p / half).max(-1)
    nearest = np.clip(p[..., 2], -half[2], half[2])[..., None] * [0, 0, 1]
    return np.linalg.norm(p - nearest, axis=-1) / half[0]


def second_ink(kind: int, half: np.ndarray, pattern: int, extent: float, p: np.ndarray) -> np.ndarray:  # -> bool
    z = p[..., 2] / (half[2] + (half[0] if kind == CAPSULE else 0))
    if pattern == STRIPES:
        return np.floor((z + 1) / 2 * extent) % 2 == 1
    if pattern == TWO_TONE:
        return z < extent
    return (pattern == PATCH) & (p[..., 1] < 0) & (np.hypot(p[..., 0] / half[0], z) < extent)


def draw_slowly(parts: Parts, turn: np.ndarray, origin: np.ndarray, rig: camera.Rig) -> np.ndarray:  # [4, H, W]
    kind, half = parts.kinds[0], parts.halves[0]
    rows, columns = np.indices((rig.height, rig.width)) + 0.5
    rays = np.stack([(columns - rig.width / 2) / rig.focal, (rows - rig.height / 2) / rig.focal, columns * 0 + 1], -1)
    rays = rays @ rig.viewmats[0, :3, :3]  # rows are camera axes: camera to world
    place = origin + turn @ parts.centres[0]

    def local(t: np.ndarray) -> np.ndarray:  # [..., H, W] -> [..., H, W, 3]
        return (rig.c2w[0, :3, 3] + t[..., None] * rays - place) @ turn

    marks = np.linspace(2.5, 5, 1000)[:, None, None] + np.zeros(columns.shape)
    inside = level(kind, half, local(marks)) < 1
    hit, first = inside.any(0), inside.argmax(0)
    near, far = (np.take_along_axis(marks, np.maximum(i, 0)[None], 0)[0] for i in (first - 1, first))
    for _ in range(40):
        middle = (near + far) / 2
        within = level(kind, half, local(middle)) < 1
        near, far = np.where(within, near, middle), np.where(within, middle, far)
    p = local(far)
    step = 1e-5 * np.eye(3)
    normal = np.stack([level(kind, half, p + d) - level(kind, half, p - d) for d in step], -1)
    normal = (normal / np.linalg.norm(normal, axis=-1, keepdims=True)) @ turn.T
    bright = toyrender.AMBIENT + toyrender.SKY * normal[..., 2] + toyrender.LAMP * normal @ np.array(toyrender.LIGHT)
    bright = np.clip(bright, toyrender.LEAST, toyrender.MOST)
    second = second_ink(kind, half, parts.patterns[0], parts.extents[0], p)
    rgb = np.where(second[..., None], parts.inks[0, 1], parts.inks[0, 0]) * bright[..., None]
    return np.concatenate([np.where(hit[..., None], np.minimum(rgb, 1), 1), hit[..., None]], -1).transpose(2, 0, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_draws_what_its_slow_twin_draws(shape, pattern):
    rig = camera.orbit(5, elevation_deg=15, width=32, height=32)
    rig = replace(rig, azimuth=rig.azimuth[:1], elevation=rig.elevation[:1])
    parts = solid(*shape, *pattern, centre=(0.05, -0.1, 0.1))
    turn, origin = toys._rotations(np.array([0.4, -0.3, -0.9])), np.array([0.1, 0.05, -0.05])
    fast = toyrender.draw(parts, turn[None, None], origin[None, None], rig.viewmats, rig.focal, 32, 1)[0]
    slow = draw_slowly(parts, turn, origin, rig)
    assert slow[3].sum() > 50
    off = np.abs(fast - slow).max(0) > 2e-3
    assert off.mean() <= 0.003, f"{off.sum()} of {off.size} rays differ"  # a ray may graze an edge


def test_nearer_solids_cover_those_behind():
    two = [solid(ELLIPSOID, (0.3, 0.1, 0.3), centre=(0, y, 0)) for y in (-0.5, 0.5)]
    two[0] = two[0]._replace(inks=np.array([[(0.0, 0.9, 0.0)] * 2]))
    one = {"turns": np.eye(3)[None, None], "origins": np.zeros((1, 1, 3)), "focal": 50.0, "size": 32, "samples": 1}
    for order in (two, two[::-1]):
        parts = Parts(*(np.concatenate(arrays) for arrays in zip(*order, strict=True)))
        picture = toyrender.draw(parts, viewmats=camera.orbit(1).viewmats, **one)[0]
        assert picture[0, 16, 16] < 0.1 < picture[1, 16, 16]
