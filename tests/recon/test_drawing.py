"""Views, turntable and contact sheet show the right thing from the right side at the right time."""

import math

import numpy as np
import pytest
import torch

from d2.camera import look_at_origin, orbit_positions
from d2.recon import drawing
from d2.recon.formats import ply
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.raster import sh

RED, GREEN, BLUE, GREY = (0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9), (0.5, 0.5, 0.5)


def blobs(places: list, colours: list, velocities: list | None = None, size: float = 0.12) -> Gaussians4D:
    """Round, opaque, long-lived Gaussians at world places."""
    count = len(places)
    identity = torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1)
    return Gaussians4D(
        means=torch.tensor(places), velocities=torch.tensor(velocities or [[0.0] * 3] * count),
        times=torch.zeros(count), log_durations=torch.full((count,), 5.0), quats=identity,
        log_scales=torch.full((count, 3), math.log(size)), opacity_logits=torch.full((count,), 6.0),
        sh=sh.rgb_to_sh0(torch.tensor(colours))[:, None],
    )  # fmt: skip


def toy() -> Gaussians4D:
    """Red in front, green on the right seen from the front, blue on top, grey in the middle."""
    return blobs([[0.0, -1, 0], [1.0, 0, 0], [0.0, 0, 1], [0.0, 0, 0]], [RED, GREEN, BLUE, GREY])


def random_object(count: int = 400, degree: int = 3) -> Gaussians4D:
    g = torch.Generator().manual_seed(3)
    return Gaussians4D(
        means=0.4 * torch.randn(count, 3, generator=g) + torch.tensor([0.2, -0.1, 0.3]),
        velocities=0.3 * torch.randn(count, 3, generator=g), times=torch.rand(count, generator=g),
        log_durations=torch.zeros(count), quats=torch.randn(count, 4, generator=g),
        log_scales=torch.randn(count, 3, generator=g) * 0.5 - 2.5,
        opacity_logits=torch.randn(count, generator=g),
        sh=0.3 * torch.randn(count, sh.bases(degree), 3, generator=g),
    )  # fmt: skip


def view(gaussians, azimuth: float, time: float = 0.0, size: int = 96, **options) -> np.ndarray:
    c2w = look_at_origin(orbit_positions(np.array([azimuth]), np.array([0.0]), 6.0))
    K = np.array([[1.5 * size, 0, size / 2], [0, 1.5 * size, size / 2], [0, 0, 1]])
    return next(drawing.render_views(gaussians, c2w, K, size, size, [time], **options))


def centroid(picture: np.ndarray, channel: int) -> tuple[float, float]:
    """Right and down, from the middle in shares of the picture, of what is mostly one colour."""
    rgb = picture[..., :3]
    others = rgb.sum(-1) - rgb[..., channel]
    weight = np.clip(rgb[..., channel] - others, 0, None) * picture[..., 3]
    y, x = np.mgrid[: len(rgb), : len(rgb)] / len(rgb) - 0.5
    return float((x * weight).sum() / weight.sum()), float((y * weight).sum() / weight.sum())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def test_front_view_shows_green_on_the_right_blue_on_top_and_red_before_the_rest():
    picture = view(toy(), 0.0)
    assert picture.dtype == np.float32 and picture.shape == (96, 96, 4)
    right, down = centroid(picture, 1)
    assert right > 0.15 and abs(down) < 0.02
    right, down = centroid(picture, 2)
    assert abs(right) < 0.02 and down < -0.15
    assert picture[48, 48, 0] > 0.8  # red hides the grey one behind it


def test_a_written_frame_has_the_front_on_minus_z_and_up_on_minus_y(tmp_path):
    # Right, down, forward by hand: what is nearest to the viewer lies at z = -1, the top at y = -1.
    ply.write(toy().at(0.0), tmp_path / "a.ply")
    stored = ply.read(tmp_path / "a.ply", "world").means  # as it stands in the file
    expected = torch.tensor([[0.0, 0, -1], [1, 0, 0], [0, -1, 0], [0, 0, 0]])
    torch.testing.assert_close(stored, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("degree", [0, 3])
def test_a_written_frame_drawn_in_its_own_axes_is_the_picture_of_the_source(tmp_path, degree):
    source = random_object(degree=degree)
    ply.write(source.at(0.5), tmp_path / "a.ply")
    stored, back = ply.read(tmp_path / "a.ply", "world"), ply.read(tmp_path / "a.ply")
    c2w = look_at_origin(orbit_positions(np.array([0.0, 0.7]), np.array([0.0, 0.4]), 6.0))
    K = np.array([[144.0, 0, 48], [0, 144, 48], [0, 0, 1]])
    expected = list(drawing.render_views(source, c2w, K, 96, 96, [0.5, 0.5]))
    for picture, truth in zip(drawing.render_views(back, c2w, K, 96, 96, [0, 0]), expected, strict=True):
        assert psnr(picture[..., :3] * picture[..., 3:], truth[..., :3] * truth[..., 3:]) > 60
    # A camera of the file's own world: it stands on -z, x to the right, y down, and looks along +z.
    camera = np.diag([1.0, -1, -1, 1])
    camera[2, 3] = -6
    picture = next(drawing.render_views(stored, camera[None], K, 96, 96, [0]))
    assert psnr(picture[..., :3] * picture[..., 3:], expected[0][..., :3] * expected[0][..., 3:]) > 60


def test_straight_alpha_over_a_background_is_the_opaque_picture():
    straight, over = view(toy(), 0.3), view(toy(), 0.3, background=(0.2, 0.4, 0.6))
    alpha = straight[..., 3:]
    by_hand = straight[..., :3] * alpha + (1 - alpha) * np.array([0.2, 0.4, 0.6])
    np.testing.assert_allclose(over[..., :3], by_hand, atol=2e-6)
    assert (over[..., 3] == 1).all() and straight[0, 0, 3] == 0


def test_the_backend_asked_for_draws():
    np.testing.assert_allclose(view(toy(), 0.3, backend="reference"), view(toy(), 0.3), atol=1e-4)


def test_framing_finds_a_moving_object_and_ignores_floaters_and_the_invisible():
    places = [[x, y, z] for x in (1.5, 2.5) for y in (-0.5, 0.5) for z in (0.5, 1.5)] * 125
    still = blobs(places, [GREY] * 1000, size=0.01)
    found = drawing.framing(still)
    np.testing.assert_allclose(found.center, [2, 0, 1], atol=1e-3)
    assert found.radius == pytest.approx(math.sqrt(0.75) + 0.01, abs=1e-3)
    still.means[0] = torch.tensor([500.0, 0, 0])
    still.means[8:16] = 90.0
    still.opacity_logits[8:16] = -8.0
    assert drawing.framing(still).radius == pytest.approx(found.radius, abs=0.02)
    still.velocities[:, 0] = 2.0
    moved = drawing.framing(still)
    np.testing.assert_allclose(moved.center, [3, 0, 1], atol=0.05)
    assert moved.radius == pytest.approx(math.hypot(1.5, 0.5, 0.5), abs=0.05)


def test_a_single_tiny_faint_gaussian_can_be_framed_and_seen():
    one = blobs([[0.3, 0.2, 0.1]], [RED], size=1e-5)
    one.opacity_logits[:] = -4.0
    picture = next(drawing.turntable(one, [0.0], 32, 32))
    assert np.isfinite(picture).all() and picture.min() < 255


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 48), (48, 96)])
def test_the_framed_object_fills_the_picture_and_is_not_cut(width, height):
    corners = [[x, y, z] for x in (1.0, 2) for y in (1.0, 2) for z in (1.0, 2)]
    for picture in drawing.turntable(blobs(corners, [GREY] * 8, size=0.05), [0.0] * 8, width, height):
        ink = picture.min(-1) < 250
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert not border.any()
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) > 0.55 * min(width, height)


@pytest.mark.parametrize(("frames", "fps", "expected"), [(25, 24, 100), (24, 24, 96), (240, 24, 240), (1, 24, 96)])
def test_a_turn_takes_whole_plays_of_the_clip(frames, fps, expected):
    times = np.linspace(0, 1, frames)
    moments = drawing.loop_times(times, fps)
    assert len(moments) == expected and expected % frames == 0
    np.testing.assert_array_equal(moments.reshape(-1, frames), np.tile(times, (expected // frames, 1)))


def test_the_turntable_turns_once_while_time_advances():
    moving = blobs([[0.0, -0.5, -0.2], [0.5, 0, -0.2]], [RED, GREEN], [[0.0, 0, 0.4], [0, 0, 0]])
    framed = drawing.Framing(np.zeros(3), 1.0)
    pictures = list(drawing.turntable(moving, drawing.loop_times([0.0, 1.0], 1), 64, 64, elevation=0, framed=framed))
    assert len(pictures) == 4
    unit = [np.concatenate([p / 255, np.ones((64, 64, 1))], -1) for p in pictures]
    # A quarter turn takes the camera from the front to +x, where the front is on the left.
    assert [round(centroid(p, 0)[0], 1) for p in unit] == [0.0, -0.2, 0.0, 0.2]
    assert [round(centroid(p, 0)[1], 1) for p in (unit[1], unit[3])] == [-0.1, -0.1]  # at time 1 it has risen
    assert centroid(unit[0], 0)[1] > 0.05


def test_contact_sheet_has_a_row_an_azimuth_and_a_column_a_moment():
    moving = blobs([[0.0, -0.5, 0]], [RED], [[0.0, 0, 0.5]])
    calls = []
    sheet = drawing.contact_sheet(
        moving, [0.0, 0.5, 1.0], np.array([0.0, math.pi / 2]), 50, progress=lambda *call: calls.append(call)
    )
    assert sheet.shape == (20 + 2 * 50, 44 + 3 * 50, 3) and sheet.dtype == np.uint8
    assert calls == [(k + 1, 6) for k in range(6)]
    heights = []
    for row in range(2):
        for column in range(3):
            tile = sheet[20 + row * 50 :, 44 + column * 50 :][:50, :50] / 255
            heights.append(centroid(np.concatenate([tile, np.ones((50, 50, 1))], -1), 0)[1])
    assert heights[0] > heights[1] > heights[2] and heights[3] > heights[4] > heights[5]
    assert (sheet[:20, 44:] < 128).any() and (sheet[20:, :44] < 128).any()  # the labels


def test_static_gaussians_are_drawn_as_they_are():
    moving = random_object()
    still = moving.at(0.5)
    assert isinstance(still, Gaussians3D)
    np.testing.assert_allclose(view(still, 0.2), view(moving, 0.2, time=0.5), atol=1e-4)


def test_fitting_distances_hold_the_object_and_not_much_more():
    tower = blobs([[0.0, 0, 1], [0.0, 0, -1]], [RED, BLUE], size=0.02)
    above, below, beside = drawing.fitting_distances(tower, np.zeros(3), elevation=0.0, fov=math.radians(90))
    assert above == pytest.approx(below) == pytest.approx(1.05 * 1.02, rel=0.02) and beside < 0.1
    bar = blobs([[1.0, 0, 0], [-1.0, 0, 0]], [RED, BLUE], size=0.02)
    above, _, beside = drawing.fitting_distances(bar, np.zeros(3), elevation=0.0, fov=math.radians(90))
    assert 1.0 < above < 1.2 and 1.3 < beside < 1.7  # end on, its near end is 1 nearer; turned by 45°, √2 is needed
