import math

import numpy as np
import pytest

from d2 import camera

V = 7
RIG = camera.orbit(V, elevation_deg=20, radius=3.0, fov_deg=40, width=64, height=48)


def project(rig: camera.Rig, point: list[float]) -> np.ndarray:  # -> [V, 3] pixels x, y and depth
    seen = rig.viewmats @ np.array([*point, 1.0])
    pixel = seen[:, :3] @ rig.K.T
    return np.concatenate([pixel[:, :2] / pixel[:, 2:], seen[:, 2:3]], 1)


def test_last_view_is_the_input_view_on_minus_y_looking_along_plus_y():
    rig = camera.orbit(V, elevation_deg=0, radius=3.0)
    assert rig.azimuth[-1] == 0
    np.testing.assert_allclose(rig.c2w[-1, :3, 3], [0, -3, 0], atol=1e-12)
    np.testing.assert_allclose(-rig.c2w[-1, :3, 2], [0, 1, 0], atol=1e-12)


def test_view_v_stands_at_its_azimuth_and_elevation():
    for v in range(V):
        az, el = 2 * math.pi * (v + 1) / V, math.radians(20)
        expected = 3.0 * np.array([math.sin(az) * math.cos(el), -math.cos(az) * math.cos(el), math.sin(el)])
        np.testing.assert_allclose(RIG.c2w[v, :3, 3], expected, atol=1e-12)


def test_clockwise_orbit_is_the_mirror_image_and_keeps_the_input_view():
    other = camera.orbit(V, elevation_deg=20, radius=3.0, clockwise=True)
    np.testing.assert_allclose(other.c2w[:, :3, 3], RIG.c2w[:, :3, 3] * [-1, 1, 1], atol=1e-12)
    assert other.azimuth[-1] == 0


def test_origin_projects_to_the_centre_of_every_picture_at_the_radius():
    np.testing.assert_allclose(project(RIG, [0, 0, 0]), [[32, 24, 3]] * V, atol=1e-9)


def test_up_is_up_in_every_picture():
    assert (project(RIG, [0, 0, 0.5])[:, 1] < 24).all()


def test_right_hand_side_of_the_object_is_right_in_the_input_view():
    assert project(RIG, [0.5, 0, 0])[-1, 0] > 32


def test_edge_of_the_field_of_view_is_the_edge_of_the_picture():
    half = 3.0 * math.tan(math.radians(20))
    rig = camera.orbit(V, elevation_deg=0, radius=3.0, fov_deg=40, width=64, height=48)
    assert project(rig, [half, 0, 0])[-1, 0] == pytest.approx(64)


def test_poses_are_rigid_and_viewmats_invert_them():
    R = RIG.c2w[:, :3, :3]
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (V, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(R), 1)
    np.testing.assert_allclose(
        RIG.viewmats @ RIG.c2w @ camera.OPENGL_TO_OPENCV, np.broadcast_to(np.eye(4), (V, 4, 4)), atol=1e-12
    )


@pytest.mark.parametrize("elevation_deg", [90, -90, 89.9999999])
def test_looking_straight_down_or_up_gives_finite_rigid_poses(elevation_deg):
    rig = camera.orbit(4, elevation_deg=elevation_deg)
    np.testing.assert_allclose(np.linalg.det(rig.c2w[:, :3, :3]), 1)


def test_cameras_can_look_at_another_target():
    c2w = camera.look_at_origin(np.array([[2.0, 0, 1]]), target=np.array([0.0, 0, 1]))
    np.testing.assert_allclose(-c2w[0, :3, 2], [-1, 0, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("turn", "up", "viewer"), [(camera.TO_Y_UP, [0, 1, 0], [0, 0, 1]), (camera.TO_RDF, [0, -1, 0], [0, 0, -1])]
)
def test_turns_for_other_tools_are_rotations_that_put_up_and_front_where_those_expect_them(turn, up, viewer):
    assert np.linalg.det(turn) == pytest.approx(1)
    np.testing.assert_allclose(turn @ [0, 0, 1], up)
    np.testing.assert_allclose(turn @ [0, -1, 0], viewer)
