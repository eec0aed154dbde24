"""Turning Gaussians into other axes keeps the object and its colours."""

import math

import numpy as np
import pytest
import torch

from d2.recon.formats import frames
from d2.recon.gaussians import Gaussians3D, quaternions
from d2.recon.raster import sh
from d2.recon.raster.reference import rotation_matrices


def random_rotation(seed: int) -> np.ndarray:
    Q, R = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    Q = Q * np.sign(np.diag(R))
    return Q * np.linalg.det(Q)


def random_set(seed: int, count: int = 20, degree: int = 3) -> Gaussians3D:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians3D(
        means=torch.randn(count, 3, generator=generator),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=-1),
        scales=torch.rand(count, 3, generator=generator) + 0.01,
        opacities=torch.rand(count, generator=generator),
        sh=torch.randn(count, sh.bases(degree), 3, generator=generator),
    )


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_turned_colour_seen_along_a_turned_direction_is_the_old_colour(degree, seed):
    rotation = random_rotation(seed)
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(50, sh.bases(degree), 3, generator=generator, dtype=torch.float64)
    directions = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    turned = frames.rotate_sh(coefficients, rotation)
    before = sh.evaluate(degree, directions, coefficients)
    after = sh.evaluate(degree, directions @ torch.from_numpy(rotation).T, turned)
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


def test_turning_to_rub_from_rdf_flips_the_signs_that_other_tools_use():
    between = frames.FROM_WORLD["rub"] @ frames.FROM_WORLD["rdf"].T
    np.testing.assert_array_equal(between, np.diag([1, -1, -1]))
    signs = [1, -1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1]
    coefficients = random_set(0).sh
    expected = coefficients * torch.tensor(signs, dtype=torch.float32)[:, None]
    torch.testing.assert_close(frames.rotate_sh(coefficients, between), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_turned_covariance_is_the_covariance_turned(seed):
    rotation, gaussians = random_rotation(seed), random_set(seed)
    turned = frames.rotate(gaussians, rotation)
    R = torch.from_numpy(rotation).float()
    old = rotation_matrices(gaussians.quats) * gaussians.scales[:, None]
    new = rotation_matrices(turned.quats) * turned.scales[:, None]
    torch.testing.assert_close(new @ new.mT, R @ (old @ old.mT) @ R.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.means, gaussians.means @ R.T)


@pytest.mark.parametrize("frame", ["rdf", "rub", "world"])
def test_going_to_a_frame_and_back_changes_nothing(frame):
    gaussians = random_set(1)
    back = frames.from_frame(frames.to_frame(gaussians, frame), frame)
    torch.testing.assert_close(back.means, gaussians.means)
    torch.testing.assert_close(back.sh, gaussians.sh, atol=1e-5, rtol=0)
    same = (back.quats * gaussians.quats).sum(-1).abs()
    torch.testing.assert_close(same, torch.ones_like(same), atol=1e-6, rtol=0)


def test_front_and_up_go_where_each_frame_says():
    front, up = np.array([0.0, -1, 0]), np.array([0.0, 0, 1])
    # rdf: down is +y and the viewer, in front of the object, stands on -z; rub: up is +y, the viewer on +z.
    np.testing.assert_array_equal(frames.FROM_WORLD["rdf"] @ front, [0, 0, -1])
    np.testing.assert_array_equal(frames.FROM_WORLD["rdf"] @ up, [0, -1, 0])
    np.testing.assert_array_equal(frames.FROM_WORLD["rub"] @ front, [0, 0, 1])
    np.testing.assert_array_equal(frames.FROM_WORLD["rub"] @ up, [0, 1, 0])
    for rotation in frames.FROM_WORLD.values():
        assert math.isclose(np.linalg.det(rotation), 1)


def test_a_quarter_turn_about_z_has_the_quaternion_it_should():
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    gaussians = random_set(2, count=1, degree=0)
    unturned = Gaussians3D(gaussians.means, torch.tensor([[1.0, 0, 0, 0]]), *list(vars(gaussians).values())[2:])
    half = math.sqrt(0.5)
    torch.testing.assert_close(frames.rotate(unturned, quarter).quats, torch.tensor([[half, 0, 0, half]]))
    torch.testing.assert_close(quaternions(torch.from_numpy(quarter)[None]).float(), torch.tensor([[half, 0, 0, half]]))
