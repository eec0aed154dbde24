"""The rival of the reconstruction benchmark: its form is ours, its kernels have its gradients, it learns."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from surroundings import ROOT

from d2.recon import dataset
from d2.recon.gaussians import from_two_quaternions
from d2.recon.raster.reference import rotation_matrices


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def given(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(count, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]


def known_form(left, right, log_scales):
    N = len(left)
    rest = torch.full((N,), 0.5, dtype=torch.float64), torch.zeros(N, 1, 3, dtype=torch.float64)
    form = from_two_quaternions(torch.zeros(N, 4, dtype=torch.float64), left, right, log_scales.exp(), *rest)
    return form.velocities, form.log_durations.exp(), form.quats, form.log_scales.exp()


def covariances(quats, scales):
    M = rotation_matrices(quats) * scales[:, None]
    return M @ M.mT


def test_slices_and_gradients_are_those_of_the_known_map():
    from two_quaternions import velocity_form, velocity_form_reference

    g = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(60, *shape, generator=g, dtype=torch.float64) for shape in ((3,), (), (3, 3)))
    found = []
    for form in (known_form, velocity_form, velocity_form_reference):
        tensors = given(60)
        velocities, durations, quats, scales = form(*tensors)
        loss = (velocities * a).sum() + (durations * b).sum() + (covariances(quats, scales) * c).sum()
        found.append((velocities, durations, covariances(quats, scales), *torch.autograd.grad(loss, tensors)))
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_round_gaussians_have_finite_gradients():
    from two_quaternions import velocity_form, velocity_form_reference

    unit = torch.tensor([1.0, 0, 0, 0]).repeat(5, 1)
    for form in (velocity_form, velocity_form_reference):
        tensors = [unit.clone().requires_grad_(), unit.clone().requires_grad_(), torch.zeros(5, 4, requires_grad=True)]
        velocities, durations, quats, scales = form(*tensors)
        loss = velocities.sum() + durations.sum() + (covariances(quats, scales)).sum()
        gradients = torch.autograd.grad(loss, tensors)
        assert all(torch.isfinite(g).all() for g in gradients)
        torch.testing.assert_close(gradients[2], torch.tensor([[2.0, 2, 2, 1]]).repeat(5, 1))


def test_splits_clones_and_prunes_by_its_rules():
    import fudan

    N = 4  # a small and a large one of a steep gradient, a calm one, a faint one
    unit = torch.tensor([1.0, 0, 0, 0]).repeat(N, 1)
    scaling = torch.log(torch.tensor([0.001, 0.1, 0.1, 0.1]))[:, None].repeat(1, 4)
    tensors = {
        "xyz": torch.zeros(N, 3), "t": torch.full((N,), 0.5), "f_dc": torch.arange(3.0 * N).view(N, 3),
        "f_rest": torch.zeros(N, 47, 3), "opacity": torch.tensor([0.0, 0, 0, -8]), "scaling": scaling,
        "rotation": unit, "rotation_r": unit.clone(),
    }  # fmt: skip
    model = fudan.Model(tensors, 1.0, fudan.Settings())
    model.gradient, model.seen = torch.tensor([1.0, 1, 0, 0]), torch.ones(N)
    fudan.densify_and_prune(model, torch.Generator().manual_seed(0))
    assert model["f_dc"][:, 0].tolist() == [0, 6, 0, 3, 3]  # small, calm, its clone, two halves; the faint one is gone
    assert model["xyz"][3:].abs().amax(-1).min() > 0 and model["t"][3] != 0.5
    torch.testing.assert_close(model["scaling"][3:].exp(), torch.full((2, 4), 0.1 / 1.6))
    assert model.gradient.tolist() == [0] * 5


@pytest.mark.parametrize(("fitted", "degrees"), [(False, (0, 0)), (True, (3, 2))])
def test_it_learns_a_tiny_scene_with_its_own_schedule_and_with_one_fitted_to_the_time(
    tiny_dataset, monkeypatch, fitted, degrees
):
    import fudan

    ticks = itertools.count()
    monkeypatch.setattr(fudan.time, "perf_counter", lambda: float(next(ticks)))  # one second a step
    data = dataset.load(tiny_dataset)
    losses = []
    model, iterations = fudan.train_for(
        data, 40, fitted, fudan.Settings(num_pts=60_000), callback=lambda iteration, loss: losses.append(float(loss))
    )
    assert iterations == len(losses) == 39
    assert (model.degree, model.degree_time) == degrees
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert fudan.picture(model, data, 0).shape == (32, 32, 3)
