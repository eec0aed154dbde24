"""The loss of a picture as dataset and configuration weigh it."""

import dataclasses

import pytest
import torch

from d2 import fileio
from d2.config import load
from d2.errors import SetupError
from d2.recon import dataset, objective, perceptual, train
from d2.recon.config import ReconstructConfig

WHITE = torch.ones(3)


@pytest.fixture
def data(run_folder):
    return dataset.load(run_folder)


def render(data):
    g = torch.Generator().manual_seed(0)
    alpha = torch.rand(data.height, data.width, generator=g)
    image = torch.rand(data.height, data.width, 3, generator=g) * alpha[..., None]
    return image.requires_grad_(), alpha.requires_grad_()


def gradients(data, sets, lpips=None):
    image, alpha = render(data)
    loss = objective.picture_loss(image, alpha, data, 2, WHITE, load(ReconstructConfig, sets), lpips)
    return loss.detach(), *torch.autograd.grad(loss, (image, alpha))


def test_the_worst_pixels_teach_nothing_and_the_others_as_before(data):
    _, plain, plain_alpha = gradients(data, {"ssim_weight": 0})
    _, trimmed, trimmed_alpha = gradients(data, {"ssim_weight": 0, "trim": 0.25})
    dropped = (trimmed == 0).all(-1) & (plain != 0).any(-1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(trimmed[~dropped], plain[~dropped]) and torch.equal(
        trimmed_alpha[~dropped], plain_alpha[~dropped]
    )
    image, alpha = render(data)
    truth = data.images[2] / 255
    errors = (image + (1 - alpha[..., None]) - truth[..., :3] - (1 - truth[..., 3:])).abs().sum(-1)
    assert errors[dropped].min() >= errors[~dropped].max()


def test_a_picture_counts_as_much_as_its_weight(data):
    weighed = dataclasses.replace(data, weights=torch.full((len(data),), 0.25))
    loss, gradient, _ = gradients(data, {})
    lighter, lighter_gradient, _ = gradients(weighed, {})
    assert float(lighter) == pytest.approx(float(loss) / 4)
    assert torch.allclose(lighter_gradient, gradient / 4)
    assert weighed.subset(torch.arange(3)).weights.tolist() == [0.25] * 3


def test_lpips_is_added_with_its_weight(data, tmp_path):
    torch.manual_seed(0)
    weights = perceptual.LPIPS(perceptual.ALEXNET).state_dict()
    fileio.write_tensors(tmp_path / "alex.safetensors", {name: tensor.abs() for name, tensor in weights.items()})
    state = train.start(data, load(ReconstructConfig, {"start_gaussians": 50}), "cpu")
    assert state.lpips is None
    settings = load(ReconstructConfig, {"lpips_weight": 0.5, "lpips": str(tmp_path / "alex.safetensors")})
    train.equip(state, settings)
    assert isinstance(state.lpips, perceptual.LPIPS)
    large = dataclasses.replace(data, images=data.images.repeat_interleave(2, 1).repeat_interleave(2, 2))
    loss, gradient, _ = gradients(large, {"lpips_weight": 1e4}, state.lpips)
    plain, plain_gradient, _ = gradients(large, {})
    image, alpha = render(large)
    truth = large.images[2] / 255
    pair = image + (1 - alpha[..., None]), truth[..., :3] + 1 - truth[..., 3:]
    distance = state.lpips(*(x.detach().permute(2, 0, 1)[None] for x in pair))
    assert float(loss - plain) == pytest.approx(1e4 * float(distance), rel=1e-4)
    assert not torch.equal(gradient, plain_gradient)


def test_lpips_without_its_file_is_one_line(data):
    with pytest.raises(SetupError, match="--set lpips=FILE"):
        train.start(data, load(ReconstructConfig, {"lpips_weight": 0.5, "start_gaussians": 50}), "cpu")


def test_opacities_are_reset_and_so_is_what_adam_remembers_of_them(data):
    config = load(ReconstructConfig, {"start_gaussians": 200, "max_gaussians": 200, "opacity_reset_every": 5,
                                      "iterations": 100, "holdout": 0})  # fmt: skip
    state = train.start(data, config, "cpu")
    for _ in range(5):
        assert float(state.gaussians.opacity_logits.detach().sigmoid().max()) > 2 * config.prune_opacity
        train.step(state, data, config, 0.1)
    assert float(state.gaussians.opacity_logits.detach().sigmoid().max()) <= 2 * config.prune_opacity + 1e-6
    assert float(state.adam.state[state.gaussians.opacity_logits]["exp_avg"].abs().max()) == 0
    assert float(state.adam.state[state.gaussians.means]["exp_avg"].abs().max()) > 0


def test_the_input_view_and_the_moment_of_the_views_count_in_full(run_folder, tmp_path, monkeypatch):
    from d2.recon import pipeline

    seen = []
    monkeypatch.setattr(
        train, "fit", lambda state, data, *rest: seen.append(data) or train.validate(state, data, rest[0])
    )
    sets = ("others_weight=0.3", "start_gaussians=50", "max_gaussians=50", "iterations=1")
    pipeline.reconstruct(run_folder, tmp_path / "out", sets=sets)
    (data,) = seen
    trusted = (data.views == data.views.max()) | (data.times == 0)
    assert torch.equal(data.weights, torch.where(trusted, 1.0, 0.3)) and 0 < int(trusted.sum()) < len(data)


@pytest.mark.parametrize(
    ("loss", "fraction", "weight"), [(0.1, 0.5, 1), (0.15, 0.5, 2), (0.1, 0.05, 0), (0.04, 0.5, 0)]
)
def test_haze_weighs_as_much_as_pictures_contradict_once_they_had_time_to_agree(data, loss, fraction, weight):
    settings = load(ReconstructConfig, {"start_gaussians": 50, "haze_weight": 0.1, "correct_from": 0.1})
    g = train.start(data, settings, "cpu").gaussians
    error = torch.tensor(loss, requires_grad=True)
    prior = torch.as_tensor(objective.priors(g, 1.0, error, fraction, settings))
    assert float(prior.detach()) == pytest.approx(
        0.1 * weight * float(g.opacity_logits.detach().sigmoid().mean()), rel=1e-5
    )
    if weight:
        prior.backward()
        assert (g.opacity_logits.grad > 0).all() and error.grad is None
