import dataclasses
from functools import partial

import pytest
import torch

from d2.config import load
from d2.recon import dataset, train
from d2.recon.config import ReconstructConfig
from d2.recon.corrections import FIELDS, KINDS, Correction, Corrections, corrected_image

ALL = dict.fromkeys(FIELDS.values(), True)
NONE = Correction(None, None, None, None)


@pytest.fixture
def learned():
    return Corrections.start(4, load(ReconstructConfig, ALL), torch.tensor([0.1, -0.2, 0.3]), 0.7, "cpu")


def test_nothing_is_corrected_unless_asked_for():
    assert Corrections.start(4, ReconstructConfig(), torch.zeros(3), 1.0, "cpu") is None
    only = Corrections.start(4, load(ReconstructConfig, {"correct_times": True}), torch.zeros(3), 1.0, "cpu")
    assert list(only.values) == ["times"]
    correction, _ = only.of_picture(2)
    assert correction.poses is None and correction.times.shape == (1,)


def test_zero_corrections_change_nothing(learned):
    correction, prior = learned.of_picture(1)
    image, alpha, viewmat = torch.rand(12, 10, 3), torch.rand(12, 10, 1), torch.eye(4)
    bent, mask = corrected_image(image, alpha, correction)
    assert torch.allclose(bent, image, atol=1e-6) and torch.allclose(mask, alpha, atol=1e-6)
    assert torch.equal(learned.viewmat(viewmat, correction.poses), viewmat)
    assert float(prior.detach()) == 0


def test_a_correction_common_to_all_pictures_is_none(learned):
    for value in learned.values.values():
        value.data.fill_(0.5)
    correction, prior = learned.of_picture(3)
    assert all(float(part.detach().abs().max()) == 0 for part in correction) and float(prior.detach()) == 0


def test_a_pose_turns_the_scene_about_its_centre_and_moves_it(learned):
    viewmat = torch.eye(4)
    viewmat[:3, 3] = torch.tensor([0.0, 0.0, 4.0])
    turned = learned.viewmat(viewmat, torch.tensor([0.0, 0.0, 0.2, 0.0, 0.0, 0.0]))
    place = torch.cat([learned.centre, torch.ones(1)])
    assert torch.allclose(turned @ place, viewmat @ place, atol=1e-6)
    expected = torch.tensor([[0.2, 0.2]]).cos() * torch.eye(2) + 0.2 * 0
    assert torch.allclose(turned[:2, :2].diagonal(), expected.diagonal(), atol=1e-6)
    moved = learned.viewmat(viewmat, torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0]))
    assert torch.allclose((moved - viewmat)[:3, 3], torch.tensor([0.07, 0.0, 0.0]), atol=1e-6)


def test_a_warp_displaces_by_its_fraction_of_the_image():
    image = torch.zeros(20, 20, 3)
    image[8, 11] = 1
    warp = torch.zeros(KINDS["warps"][0])
    warp[:25] = 2 / 20  # look two pixels to the right: the picture moves two to the left
    bent, _ = corrected_image(image, image[..., :1], NONE._replace(warps=warp))
    assert torch.allclose(bent[8, 9], torch.ones(3), atol=1e-4) and float(bent.sum()) == pytest.approx(3, abs=1e-3)


def test_colours_are_affine_and_leave_the_empty_pixels_empty():
    image, alpha = torch.full((2, 2, 3), 0.4), torch.tensor([[[1.0], [0.5]], [[0.0], [0.0]]])
    image = image * alpha
    colors = torch.tensor([0.1, 0.0, -0.1, 0.05, 0.0, 0.0])
    bent, _ = corrected_image(image, alpha, NONE._replace(colors=colors))
    assert torch.allclose(bent[0, 0], torch.tensor([0.4 * 1.1 + 0.05, 0.4, 0.36]))
    assert float(bent[1].abs().max()) == 0


def test_the_gradient_of_every_kind_is_that_of_the_dense_twin(run_folder, monkeypatch):
    """Poses go through viewmats, times through the motion; colours and warps follow the rasterizer."""
    data = dataset.load(run_folder)
    config = load(ReconstructConfig, ALL | {"start_gaussians": 300, "max_gaussians": 300, "holdout": 0})
    state = train.start(data, config, "cpu")
    state.gaussians.velocities.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    target = torch.rand(data.height, data.width, 3, generator=torch.Generator().manual_seed(1))

    def objective():
        images, _, _, _ = train._draw_corrected(state.corrections, state, data, torch.tensor([3]), config)
        return (images[0] * target).mean()

    def gradients():
        objective().backward()
        found = {kind: value.grad.to_dense() for kind, value in state.corrections.values.items()}
        state.corrections.adam.zero_grad()
        return found

    fast = gradients()
    for kind in ("colors", "warps"):  # what is drawn stays, so a finite difference sees the whole of the change
        value, uphill, ends = state.corrections.values[kind], fast[kind][3] / fast[kind][3].norm(), []
        for sign in (1, -1):
            value.data[3] = sign * 0.1 * uphill * len(data) / (len(data) - 1)  # the mean moves with it
            ends.append(float(objective().detach()))
        value.data[3] = 0
        assert float(fast[kind][3].norm()) == pytest.approx((ends[0] - ends[1]) / 0.2, rel=0.05), kind
    monkeypatch.setattr(train, "rasterize", partial(train.rasterize, backend="reference"))
    for kind, slow in gradients().items():
        assert set(slow.abs().sum(1).nonzero()[:, 0].tolist()) == {3}
        assert torch.allclose(fast[kind], slow, rtol=1e-3, atol=1e-3 * float(slow.abs().max())), kind


def test_only_drawn_pictures_step(learned):
    correction, _ = learned.of_picture(2)
    (correction.times.sum() + correction.poses.sum()).backward()
    learned.step(0.1)
    assert set(learned.values["times"].detach().abs().sum(1).nonzero()[:, 0].tolist()) == {2}
    assert float(learned.values["times"][2].detach()) == pytest.approx(-0.1, rel=1e-3)


def test_colour_casts_are_found(run_folder):
    """Half of the pictures are brighter: their gains come out higher, and the model is that of neither."""
    data = dataset.load(run_folder)
    pictures = data.images.clone()
    dark = torch.arange(len(data)) % 2 == 0
    pictures[dark, ..., :3] = (pictures[dark, ..., :3].float() * 0.8).to(torch.uint8)
    data = dataclasses.replace(data, images=pictures)
    sets = {
        "iterations": 300,
        "start_gaussians": 400,
        "max_gaussians": 400,
        "holdout": 0,
        "correct_colors": True,
        "lr_corrections": 1.0,
    }
    config = load(ReconstructConfig, sets | {"correction_weight": 1e-4})
    state = train.start(data, config, "cpu")
    train.fit(state, data, config)
    gains = state.corrections.values["colors"].detach()[:, :3].mean(1)
    assert float(gains[~dark].mean() - gains[dark].mean()) * KINDS["colors"][1] > 0.03
