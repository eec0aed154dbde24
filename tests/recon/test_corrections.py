import dataclasses

import pytest
import torch

from d2.config import load
from d2.recon import dataset, train
from d2.recon.config import ReconstructConfig
from d2.recon.corrections import FIELDS, KINDS, Correction, Corrections, _draw, corrected, is_due
from d2.recon.losses import soften, soften_reference

ALL = dict.fromkeys(FIELDS.values(), True)
FEW = {"start_gaussians": 400, "max_gaussians": 400, "holdout": 0, "validate_every": 1000}


@pytest.fixture
def data(run_folder):
    return dataset.load(run_folder)


def begun(data, sets):
    config = load(ReconstructConfig, FEW | sets)
    return train.start(data, config, "cpu"), config


def test_nothing_is_corrected_unless_asked_for(data):
    assert Corrections.start(data, ReconstructConfig(), torch.zeros(3), 1.0) is None
    only = Corrections.start(data, load(ReconstructConfig, {"correct_times": True}), torch.zeros(3), 1.0)
    assert list(only.values) == ["times"]
    assert only.of_picture(2, data).poses is None and only.of_picture(2, data).times.shape == (1,)


def test_zero_corrections_change_nothing(data):
    learned = Corrections.start(data, load(ReconstructConfig, ALL), torch.zeros(3), 1.0)
    viewmat, time = learned.camera(1, learned.of_picture(1, data), data)
    layers = torch.rand(12, 10, 4)
    assert torch.equal(viewmat, data.viewmats[1]) and torch.equal(time, data.times[1])
    assert torch.equal(corrected(layers, learned.of_picture(1, data)), layers)


def test_what_all_pictures_of_a_moment_share_is_the_models(data):
    learned = Corrections.start(data, load(ReconstructConfig, ALL), torch.zeros(3), 1.0)
    for value in learned.values.values():
        value += 0.5 * (1 + data.times)[:, None]
    colors, poses, times, blurs = learned.of_picture(3, data)
    assert max(float(part.abs().max()) for part in (colors, times)) < 1e-6 and float(poses.abs().max()) < 1e-3
    assert 0 <= float(blurs) <= 0.5


def test_values_count_by_how_far_they_are_beyond_their_noise(data):
    learned = Corrections.start(data, load(ReconstructConfig, ALL), torch.zeros(3), 1.0)
    values, noise = learned.values["times"], learned.noise["times"]
    assert float(learned._told("times")) == 0  # nothing visited
    noise[:12] = 0.01**2
    values[:12] = 0.01 * torch.tensor([1.0, -1.0]).repeat(6)[:, None]  # as large as their errors
    assert float(learned._told("times")) == pytest.approx(0, abs=1e-5)
    values[:12] *= 2
    assert float(learned._told("times")) == pytest.approx(0.75)
    before = learned.of_picture(0, data).times
    learned.noise["times"][:12] = 0.02**2
    assert float(before.abs()) > 0.005 and float(learned.of_picture(0, data).times) == pytest.approx(0, abs=1e-5)


def test_settled_pictures_are_solved_for_seldom():
    assert [epoch for epoch in range(20) if is_due(epoch)] == [*range(8), 8, 16]


def test_a_pose_turns_the_scene_about_its_centre_and_moves_it():
    learned = Corrections({}, {}, torch.tensor([0.1, -0.2, 0.3]), 0.7)
    turn = learned._motion(torch.tensor([0.0, 0.0, 0.2, 0.0, 0.0, 0.0]))
    place = torch.cat([learned.centre, torch.ones(1)])
    assert torch.allclose(turn @ place, place, atol=1e-6)
    assert float(torch.atan2(turn[1, 0], turn[0, 0])) == pytest.approx(0.2, abs=1e-6)
    move = learned._motion(torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0]))
    assert torch.allclose(move[:3, 3], torch.tensor([0.07, 0.0, 0.0])) and torch.equal(move[:3, :3], torch.eye(3))


def test_colours_are_affine_and_leave_the_empty_pixels_empty():
    layers = torch.full((2, 2, 4), 0.4)
    layers[..., 3:] = torch.tensor([[[1.0], [0.5]], [[0.0], [0.0]]])
    layers[..., :3] *= layers[..., 3:]
    mapped = corrected(layers, Correction(colors=torch.tensor([0.1, 0.0, -0.1, 0.05, 0.0, 0.0])))
    assert torch.allclose(mapped[0, 0, :3], torch.tensor([0.4 * 1.1 + 0.05, 0.4, 0.36]))
    assert float(mapped[1].abs().max()) == 0


def test_softening_equals_its_twin_and_so_does_its_gradient():
    layers = torch.rand(20, 17, 4, requires_grad=True)
    weights = torch.rand(20, 17, 4)
    pairs = []
    for function in (soften, soften_reference):
        soft = function(layers)
        (gradient,) = torch.autograd.grad((soft * weights).sum(), layers)
        pairs.append((soft.detach(), gradient))
    for fast, slow in zip(*pairs, strict=True):
        assert torch.allclose(fast, slow, atol=1e-6)


def test_the_change_with_each_pose_is_that_of_a_finite_difference(data):
    state, config = begun(data, {"iterations": 60, "correct_poses": True, "correct_from": 1.0})
    train.fit(state, data, config)
    learned, g, step = state.corrections, state.gaussians, 0.01
    viewmat, time = learned.camera(8, learned.of_picture(8, data), data)
    size = (data.height, data.width)

    def draw(pose):
        return _draw(g, viewmat @ learned._motion(pose), data.Ks[8], time, size, "RGB")

    with torch.no_grad():
        x = torch.nn.functional.pad(draw(torch.zeros(6)), (0, 1))
        depth = _draw(g, viewmat, data.Ks[8], time, size, "ED")[..., 0]
        columns = learned._pose_columns(x, depth, viewmat, data.Ks[8])[..., :3]
        for column, direction in zip(columns, step * torch.eye(6), strict=True):
            change = (draw(direction) - draw(-direction)) / (2 * step)
            assert float((column * change).sum() / (column.norm() * change.norm())) > 0.8
            assert 0.5 < float((column * change).sum() / change.square().sum()) < 1.2


def found(data, kind, sets, iterations=300):
    """The corrections of a kind after a fit, less what pictures of a moment share."""
    state, config = begun(data, {"iterations": iterations, FIELDS[kind]: True} | sets)
    train.fit(state, data, config)
    return torch.stack([getattr(state.corrections.of_picture(k, data), kind) for k in range(len(data))])


def test_colour_casts_are_found(data):
    """Half of the pictures are darker: their gains come out lower, and the model is that of neither."""
    pictures = data.images.clone()
    dark = data.views % 2 == 0
    pictures[dark, ..., :3] = (pictures[dark, ..., :3].float() * 0.8).to(torch.uint8)
    gains = found(dataclasses.replace(data, images=pictures), "colors", {})[:, :3].mean(1)
    assert float(gains[~dark].mean() - gains[dark].mean()) > 0.1  # 0.2 of a mean of 0.9, less what the prior keeps


def test_a_picture_that_was_moved_is_found(data):
    viewmats = data.viewmats.clone()
    viewmats[5, 0, 3] += 0.05  # to the right of its camera
    poses = found(dataclasses.replace(data, viewmats=viewmats), "poses", {})
    sideways = poses[:, 3:] @ data.viewmats[5, 0, :3]
    assert int(sideways.abs().argmax()) == 5 and float(sideways[5]) < 0


def test_a_softer_picture_is_found(data):
    pictures = data.images.clone()
    pictures[7] = (soften(pictures[7] / 255) * 255).round().to(torch.uint8)
    blurs = found(dataclasses.replace(data, images=pictures), "blurs", {})[:, 0]
    assert int(blurs.argmax()) == 7 and float(blurs[7]) > 0.1


def test_a_late_picture_is_found(data):
    times = data.times.clone()
    late = int(((data.times > 0.3) & (data.times < 0.4) & (data.views == 0)).nonzero()[0])
    times[late] += 0.1  # it is said to be later than it is, and has no other picture of its moment
    times[data.views == 1] += 0.1 * (data.times[data.views == 1] == data.times[late])  # but one that is as wrong
    data = dataclasses.replace(data, times=times)
    state, config = begun(data, {"iterations": 300, "correct_times": True})
    train.fit(state, data, config)
    assert float(state.corrections.values["times"][late]) < -KINDS["times"][1] / 10
