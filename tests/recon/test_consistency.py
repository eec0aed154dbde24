"""Agreement between neighbouring views and with true points, on shapes whose pictures can be computed."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import moving_ball

from d2.recon import consistency, dataset, geometry
from d2.recon.consistency import View

SIZE, DISTANCE = 48, 3.0
K = torch.tensor([[60.0, 0, 24], [0, 60, 24], [0, 0, 1]])
FRONT = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, DISTANCE], [0, 0, 0, 1]])  # the origin, 3 ahead


def sphere(viewmat: torch.Tensor, radius: float = 1.0) -> View:
    """A sphere at the origin whose colour follows the place on it."""
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    rays = torch.stack([columns, rows, torch.ones_like(rows)], -1) @ torch.linalg.inv(K).T
    centre = viewmat[:3, 3]
    along, square = rays @ centre, rays.square().sum(-1)
    root = along**2 - square * (centre @ centre - radius**2)
    depth = torch.where(root > 0, (along - root.clamp_min(0).sqrt()) / square, torch.inf)
    points = (rays * depth.nan_to_num(posinf=0)[..., None] - centre) @ viewmat[:3, :3]
    alpha = (root > 0).float()
    return View(viewmat, (0.5 + 0.4 * points) * alpha[..., None] + 1 - alpha[..., None], depth, alpha)


def neighbour() -> torch.Tensor:
    return consistency.turned(FRONT, torch.zeros(3), consistency.TURN)


def test_a_turned_camera_keeps_its_distance_and_what_it_looks_at():
    centre = torch.tensor([0.2, -0.1, 0.3])
    moved = consistency.turned(FRONT, centre, 0.4)
    torch.testing.assert_close(moved[:3, :3] @ centre + moved[:3, 3], FRONT[:3, :3] @ centre + FRONT[:3, 3])
    positions = [-m[:3, :3].T @ m[:3, 3] for m in (FRONT, moved)]
    angle = torch.nn.functional.cosine_similarity(*(p - centre for p in positions), dim=0).acos()
    assert 0 < angle <= 0.4 + 1e-5
    torch.testing.assert_close(moved[:3, :3] @ moved[:3, :3].T, torch.eye(3))


def test_views_of_one_object_agree():
    found = consistency.compare(sphere(FRONT), sphere(neighbour()), K, 0.05)
    assert found.compared > 0.7 * found.pixels
    assert math.sqrt(found.squared / (3 * found.compared)) < 0.001
    assert found.gaps == 0


def test_a_surface_that_the_neighbour_does_not_see_is_a_gap_and_its_colour_an_error():
    empty = sphere(neighbour(), radius=0.0)
    found = consistency.compare(sphere(FRONT), empty, K, 0.05)
    assert found.gaps == found.compared > 0.9 * found.pixels
    assert found.squared > 0.1 * found.compared


def test_what_a_nearer_surface_hides_does_not_count():
    hidden = consistency.compare(sphere(FRONT), sphere(neighbour(), radius=1.5), K, 0.05)
    assert hidden.compared == 0


def test_renders_of_two_opaque_balls_agree_and_lose_it_when_one_fades_in(run_folder):
    cells = dataset.load(run_folder)
    solid, hazy = moving_ball(), moving_ball()
    hazy.log_scales = hazy.log_scales - 3  # specks that a neighbour sees past
    good = consistency.cross_view(solid, cells, [0, 7, 14])
    assert good["cross_view_error"] < 0.05 and good["cross_view_gaps"] < 0.2
    assert consistency.cross_view(hazy, cells, [0]) == {"cross_view_error": None, "cross_view_gaps": None}


def test_chamfer_and_f_score_of_points_that_can_be_counted():
    truth = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])
    half = geometry.compare(truth[:1], truth)  # one is met, the other is a whole diagonal away
    assert half == {"chamfer_percent": pytest.approx(25), "f_score": pytest.approx(2 / 3)}
    assert geometry.compare(truth, truth) == {"chamfer_percent": 0, "f_score": pytest.approx(1)}
    assert geometry.compare(truth[:0], truth) == {"chamfer_percent": math.inf, "f_score": 0.0}


def test_distances_to_the_nearest_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(geometry, "_CHUNK", 7)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 3, generator=g).double(), torch.randn(9, 3, generator=g).double()
    torch.testing.assert_close(geometry.nearest(a, b), (a[:, None] - b).norm(dim=-1).amin(1))


def test_geometry_knows_when_each_cloud_is(run_folder):
    cells, ball = dataset.load(run_folder), moving_ball()
    g = torch.Generator().manual_seed(0)
    shell = torch.nn.functional.normalize(torch.randn(2000, 3, generator=g), dim=-1)
    clouds = [torch.cat([m + 0.2 * shell for m in ball.at(t).means]) for t in (0.0, 1.0)]
    right, wrong = geometry.score(ball, cells, clouds), geometry.score(ball, cells, clouds[::-1])
    assert right["chamfer_percent"] < 0.8 * wrong["chamfer_percent"]
