"""The sampler against distributions that are known in closed form.

With Gaussian priors N(0, A) of every column and N(0, B) of every row, and the same weights in every view, the
probability flow of the composed denoiser ends in N(0, A^w ⊗ B^(1-w)): the product of the priors' powers.
"""

import inspect
import math
from collections import Counter

import pytest
import torch

from d2.config import config, load, option
from d2.denoiser import AnalyticDenoiser, Estimate, Lines
from d2.errors import InputError, NumericalError
from d2.models.blocks import Blend
from d2.models.conditioner import Conditioning
from d2.noise import freeinit_noise, matrix_noise, starting_point
from d2.sampler import SamplerConfig, State, alone, anchor, blend, plan, refine, sample_matrix
from d2.schedule import low_pass

V, F = 4, 3


def kernel(n, length):
    """A smooth covariance of n points, variances about 1."""
    t = torch.arange(n)
    return torch.exp(-((t[:, None] - t) ** 2) / (2 * length**2)) + 0.05 * torch.eye(n)


A, B = kernel(V, 1.5), 0.5 * kernel(F, 1.0)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def models(mean):
    """The analytic view and frame models of a matrix whose cells have these means [V, F, C, h, w]."""
    columns = [condition(mean[:, f]) for f in range(mean.shape[1])]
    rows = [condition(mean[v]) for v in range(mean.shape[0])]
    return Lines(AnalyticDenoiser(A), columns, "columns"), Lines(AnalyticDenoiser(B), rows, "rows")


def condition(mean):
    T = len(mean)
    return Conditioning(torch.zeros(1, T, 1), mean[None], torch.zeros(1, T, 1))


def even_plan(frame_weight, guidance=1.0, **options):
    """A plan whose weights are the same in every view, and whose guidance is the same for all."""
    options = {"vrs": "off", "scale": 0.0} | options
    worked_out = plan(SamplerConfig(**options), torch.linspace(0, 2 * math.pi, V + 1)[1:], F)
    return worked_out._replace(
        share=torch.full((V,), frame_weight),
        view_guidance=torch.full((V,), guidance),
        frame_guidance=torch.full((F,), guidance),
    )


def sampled_covariance(worked_out):
    """The exact covariance of the result: the sampler is linear here, so it runs on a basis of its noise."""
    basis = torch.eye(V * F).view(V, F, 1, 1, V * F)
    start = starting_point(basis, worked_out.sigmas[0].item())
    views, frames = models(torch.zeros(V, F, 1, 1, V * F))
    linear = sample_matrix(State(start), worked_out, views, frames, lambda step: torch.zeros_like(start))
    linear = linear.reshape(V * F, V * F)
    return linear @ linear.T


@pytest.mark.parametrize("w", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("method", "steps"), [("heun", 60), ("dpmpp2m", 150)])
def test_the_result_has_the_covariance_of_the_composed_distribution(w, method, steps):
    expected = torch.kron(power(A, 1 - w), power(B, w))
    ours = sampled_covariance(even_plan(w, steps=steps, method=method))
    assert (ours - expected).abs().max() < 0.02 * expected.abs().max()


def test_euler_approaches_the_composed_distribution_as_steps_grow():
    expected = torch.kron(power(A, 0.5), power(B, 0.5))
    errors = [(sampled_covariance(even_plan(0.5, steps=n)) - expected).abs().max() for n in (50, 100, 200)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.05 * expected.abs().max()


def test_second_order_methods_are_closer_at_the_same_number_of_steps():
    expected = torch.kron(power(A, 0.5), power(B, 0.5))
    errors = {
        method: (sampled_covariance(even_plan(0.5, steps=40, method=method)) - expected).abs().max()
        for method in ("euler", "heun", "dpmpp2m")
    }
    assert errors["heun"] < 0.3 * errors["euler"]
    assert errors["dpmpp2m"] < 0.3 * errors["euler"]


def test_mean_and_covariance_of_samples_are_the_closed_form_within_sampling_error():
    side, guidance = 64, 2.0
    mean = torch.randn(V, F, 1, 1, 1, generator=torch.Generator().manual_seed(1)).expand(V, F, 1, side, side)
    worked_out = even_plan(0.4, guidance, steps=60, method="heun")
    noise = matrix_noise(23, "start", 0, V, F, (1, side, side))
    views, frames = models(mean)
    start = State(starting_point(noise, worked_out.sigmas[0].item()))
    x = sample_matrix(start, worked_out, views, frames, lambda step: noise).reshape(V * F, -1)
    expected = torch.kron(power(A, 0.6), power(B, 0.4))
    error = (expected.diag() / side**2).sqrt()
    assert ((x.mean(1) - guidance * mean[..., 0, 0, 0].flatten()).abs() < 5 * error).all()
    spread = (expected.diag().outer(expected.diag()) + expected**2) / side**2
    assert ((torch.cov(x) - expected).abs() < 5 * spread.sqrt() + 0.01).all()


def reference_shrinkage(sigmas, steps):
    """What VRS with too little noise leaves of the variance, by the variance's own recursion (prior of 0)."""
    variance = sigmas[0] ** 2
    for i in range(steps):
        step = (sigmas[i + 1] / sigmas[i]) ** 2
        variance = (variance * step + (sigmas[i] - sigmas[i + 1]) ** 2) * step
    return variance / sigmas[steps] ** 2


def with_renoising(vrs):
    """The exact covariance of the result for the view model alone, its renoising included."""
    steps, count = 50, 10
    worked_out = even_plan(0.0, steps=steps, vrs=vrs, vrs_steps=count, method="heun")
    width = V * F * (count + 1)  # one direction for each number that is drawn
    basis = torch.eye(width).view(V * F, count + 1, width).unbind(1)
    drawn = [b.reshape(V, F, 1, 1, width) for b in basis]
    views, _ = models(torch.zeros(V, F, 1, 1, width))
    start = State(starting_point(drawn[count], worked_out.sigmas[0].item()))
    linear = sample_matrix(start, worked_out, views, None, drawn.__getitem__).reshape(V * F, width)
    return linear @ linear.T, worked_out.sigmas.tolist()


def test_exact_vrs_keeps_the_distribution_and_the_references_shrinks_it():
    expected = torch.kron(A, torch.eye(F))
    exact, sigmas = with_renoising("exact")
    assert (exact - expected).abs().max() < 0.04 * expected.abs().max()
    reference, _ = with_renoising("reference")
    shrinkage = reference_shrinkage(sigmas, 10)
    assert shrinkage < 0.2
    assert (reference - shrinkage * expected).abs().max() < 0.05 * shrinkage * expected.abs().max()


class Constant:
    """A model whose estimate is the same everywhere; counts its calls."""

    def __init__(self, value=0.0):
        self.value, self.calls = value, 0

    def __call__(self, x, sigma):
        self.calls += 1
        estimate = torch.full_like(x, self.value)
        return Estimate(estimate, estimate)


def run(config, views, frames, shape=(V, F), callback=lambda state: None, state=None):
    views_of, frames_of = shape
    worked_out = plan(config, torch.linspace(0, 2 * math.pi, views_of + 1)[1:], frames_of)

    def noise(step):
        return matrix_noise(0, "renoise", step, views_of, frames_of, (4, 2, 2))

    start = starting_point(matrix_noise(0, "start", 0, views_of, frames_of, (4, 2, 2)), worked_out.sigmas[0].item())
    return sample_matrix(state or State(start), worked_out, views, frames, noise, callback)


def test_the_reference_evaluates_each_model_sixty_times_in_fifty_steps():
    views, frames, states = Constant(), Constant(), []
    run(SamplerConfig(), views, frames, callback=states.append)
    assert (views.calls, frames.calls, len(states)) == (60, 60, 60)
    assert Counter(s.step for s in states)[50] == 1
    assert [(s.step, s.again) for s in states[:4]] == [(0, 1), (1, 0), (1, 1), (2, 0)]


def test_a_model_whose_weight_is_zero_is_not_evaluated():
    views, frames = Constant(), Constant()
    run(SamplerConfig(steps=11, vrs="off", svd_only_from=0.5), views, frames)
    assert (views.calls, frames.calls) == (6, 11)  # q = i/10 is more than a half from i = 6
    views, frames = Constant(), Constant()
    run(SamplerConfig(steps=10, vrs="off", composition="linear"), views, frames)
    assert (views.calls, frames.calls) == (10, 9)  # the first step is the view model's alone


@pytest.mark.parametrize("model", ["view", "frame"])
def test_view_only_and_frame_only_need_no_other_model(model):
    config = SamplerConfig(steps=5, uc_type="mean", svd_cfg_warmup=True, composition="cosine")
    pair = (Constant(0.5), None) if model == "view" else (None, Constant(0.5))
    x = run(alone(config, model), *pair)
    torch.testing.assert_close(x, torch.full_like(x, 0.5))


def test_composition_weighs_front_and_side_views_differently():
    x = run(SamplerConfig(steps=5, vrs="off", scale=0.6), Constant(1.0), Constant(0.0))
    share = torch.tensor([0.25, 1.0, 0.25, 1.0])  # views at 90, 180, 270 and 360 degrees
    torch.testing.assert_close(x[:, 0, 0, 0, 0], 1 - share + share * 0.6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (2, 3), (13, 2)])
@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp2m"])
def test_any_number_of_views_and_frames_is_sampled(shape, method):
    x = run(SamplerConfig(steps=4, method=method), Constant(1.0), Constant(0.0), shape)
    assert x.shape == (*shape, 4, 2, 2)
    assert x.isfinite().all()


@pytest.mark.parametrize("vrs", ["reference", "exact", "off"])
@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp2m"])
def test_resuming_from_any_state_ends_in_the_same_bits(method, vrs):
    config = SamplerConfig(steps=6, vrs_steps=3, vrs=vrs, method=method)
    shape = torch.Size([V, F, 4, 2, 2])
    views, frames = models(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    states = []
    whole = run(config, views, frames, callback=states.append)
    for state in states:
        assert torch.equal(run(config, views, frames, state=state), whole), (state.step, state.again)


def test_a_callback_that_raises_stops_the_loop():
    def stop(state):
        if state.step == 2:
            raise KeyboardInterrupt

    views = Constant()
    with pytest.raises(KeyboardInterrupt):
        run(SamplerConfig(steps=9, vrs="off"), views, Constant(), callback=stop)
    assert views.calls == 2


def test_without_vrs_no_noise_is_drawn():
    worked_out = plan(SamplerConfig(steps=3, vrs="off"), torch.zeros(V), F)

    def never(step):
        raise AssertionError("noise was drawn")

    sample_matrix(State(torch.randn(V, F, 4, 2, 2)), worked_out, Constant(), Constant(), never)


def test_more_repeated_steps_than_steps_are_no_error():
    for vrs in ("reference", "exact"):
        assert run(SamplerConfig(steps=3, vrs=vrs, vrs_steps=10), Constant(), Constant()).isfinite().all()


def test_heun_evaluates_twice_but_once_in_the_last_step():
    views = Constant()
    run(SamplerConfig(steps=5, vrs="off", method="heun"), views, Constant())
    assert views.calls == 9


def test_the_frame_models_guidance_warms_up_where_asked():
    plain, warm = (plan(SamplerConfig(steps=5, svd_cfg_warmup=w), torch.zeros(V), F) for w in (False, True))
    assert warm.frame_guidance_at(0).tolist() == [1, 1, 1]
    torch.testing.assert_close(warm.frame_guidance_at(4), plain.frame_guidance_at(0))
    assert plain.frame_guidance_at(0).tolist() == [1.5, 2.25, 3.0]


@pytest.mark.parametrize(
    ("kind", "first", "last"), [("constant", 0.4, 0.4), ("linear", 0.0, 1.0), ("cosine", 0.0, 1.0)]
)
def test_every_schedule_is_reached_through_the_configuration(kind, first, last):
    worked_out = plan(SamplerConfig(composition=kind), torch.tensor([0.0]), 1)
    assert worked_out.weights(0).frame.item() == pytest.approx(first)
    assert worked_out.weights(49).frame.item() == pytest.approx(last)


def test_refining_starts_anew_from_the_last_result_with_fresh_high_frequencies():
    drawn, started = [], []
    mask, sigma = low_pass((V, F, 4, 4)), 80.0

    def noise(iteration):
        drawn.append(iteration)
        return matrix_noise(0, "refine", iteration, V, F, (4, 4, 4))

    def sample(noise):
        started.append(noise)
        return noise.roll(1, dims=0)

    result = refine(sample, noise, 3, sigma, mask)
    assert drawn == [0, 1, 2]
    first = started[0]
    for k in (1, 2):
        previous = started[k - 1].roll(1, dims=0)
        expected = freeinit_noise(previous, first, noise(k), sigma, mask)
        torch.testing.assert_close(started[k], expected)
    torch.testing.assert_close(result, started[2].roll(1, dims=0))
    assert not torch.allclose(started[1], started[2])


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"steps": 10**9},
        {"scale": float("nan")},
        {"scale": 1.5},
        {"vrs": "maybe"},
        {"method": "ddim"},
    ],
)
def test_values_out_of_range_are_refused_by_name(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        load(SamplerConfig, fields)


def test_noise_levels_that_do_not_fall_are_refused():
    with pytest.raises(InputError, match="sigma_min"):
        plan(SamplerConfig(sigma_min=80.0, sigma_max=1.0), torch.zeros(V), F)


@pytest.mark.parametrize(("model", "which"), [("view", 0), ("frame", 1)])
def test_an_estimate_that_is_not_finite_names_step_model_and_cell(model, which):
    class Broken(Constant):
        def __call__(self, x, sigma):
            estimate = super().__call__(x, sigma)
            if self.calls == 4:
                estimate.cond[2, 1, 0, 1, 1] = float("nan")
            return estimate

    pair = [Constant(), Constant()]
    pair[which] = Broken()
    states = []
    with pytest.raises(NumericalError, match=f"the {model} model's estimate of view 2, frame 1 .* step 3"):
        run(SamplerConfig(steps=9, vrs="off"), *pair, callback=states.append)
    assert states[-1].step == 3
    assert states[-1].x.isfinite().all()


def test_the_start_is_around_the_reference_views_only_where_asked():
    noise, latents = torch.randn(V, F, 4, 2, 2), torch.randn(V, 4, 2, 2)
    plain, around = (plan(SamplerConfig(noise_from_mv=on), torch.zeros(V), F) for on in (False, True))
    torch.testing.assert_close(plain.start(noise, latents).x, noise * (1 + 700**2) ** 0.5)
    torch.testing.assert_close(around.start(noise, latents).x, latents[:, None] + 700 * noise)


def test_freeinit_filters_a_single_row_or_column_as_the_sequence_it_is():
    for views, frames_, sequence in ((1, 6, 1), (6, 1, 0)):
        mask = plan(SamplerConfig(), torch.zeros(views), frames_).low_pass(4, 8)
        assert mask.shape == (views, frames_, 4, 8)
        assert torch.equal(mask.squeeze(1 - sequence), low_pass((6, 4, 8)))
        sample, noise, fresh = torch.randn(3, views, frames_, 2, 4, 8)
        a, b, c = (t.squeeze(1 - sequence) for t in (sample, noise, fresh))
        ours = freeinit_noise(sample, noise, fresh, 700.0, mask).squeeze(1 - sequence)
        slow = freeinit_noise(a, b, c, 700.0, low_pass((6, 4, 8)))
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-5)


def test_views_are_sampled_from_the_first_frame_unless_another_is_asked_for():
    assert anchor(SamplerConfig(), 25) == 0
    assert anchor(SamplerConfig(anchor_frame=-1), 25) == 24
    assert anchor(SamplerConfig(anchor_frame=7), 25) == 7
    for frame in (25, -26):
        with pytest.raises(InputError, match="anchor_frame"):
            anchor(SamplerConfig(anchor_frame=frame), 25)


def test_columns_look_at_each_other_only_where_asked():
    assert blend(SamplerConfig(), 25) is None
    assert blend(SamplerConfig(conv_blend=0.6), 25) == Blend(0.6, 2, "replicate", 25)
    padded = SamplerConfig(conv_blend=0.5, conv_blend_padding="reference")
    assert blend(padded, 3) == Blend(0.5, 2, "reference", 3)


def test_the_loop_fits_on_a_page():
    assert len(inspect.getsource(sample_matrix).splitlines()) <= 60


def test_a_larger_configuration_may_hold_the_samplers():
    @config
    class Whole(SamplerConfig):
        seed: int = option(23, "seed")

    whole = load(Whole, {"steps": 7, "seed": 1})
    assert plan(whole, torch.zeros(V), F).config.steps == 7
    assert alone(whole, "frame").svd_only_from == -1


@pytest.mark.parametrize(("sets", "view", "frame"), [
    ({}, True, True),
    ({"view_guidance_min": 1.0, "view_guidance_max": 1.0}, False, True),
    ({"frame_guidance_min": 1.0, "frame_guidance_max": 1.0}, True, False),
    ({"frame_guidance_min": 1.0, "frame_guidance_max": 1.0, "uc_type": "mean"}, True, True),
])  # fmt: skip
def test_a_model_is_guided_unless_its_unconditional_estimate_drops_out(sets, view, frame):
    worked_out = plan(SamplerConfig(**sets), torch.linspace(0, 6, 4), 3)
    assert (worked_out.guided_from("view") > 0, worked_out.guided_from("frame") > 0) == (view, frame)
