import dataclasses

import pytest
import torch

from d2.denoiser import AnalyticDenoiser, Estimate, GatedDenoiser, Lines, UNetDenoiser, scalings
from d2.models.blocks import Blend
from d2.models.conditioner import Conditioning
from d2.models.unet import UNetConfig, VideoUNet

TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_head_channels=16,
    context_dim=12,
    adm_in_channels=20,
)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return VideoUNet(TINY).eval().requires_grad_(False)


def condition(T, seed=0, B=1):
    g = torch.Generator().manual_seed(seed)
    crossattn, concat = torch.randn(B, T, 12, generator=g), torch.randn(B, T, 4, 4, 4, generator=g)
    return Conditioning(crossattn, concat, torch.randn(B, T, 20, generator=g))


class Spy:
    """A denoiser that writes down what it is called with."""

    def __init__(self):
        self.calls = []
        self.prepared = 0

    def prepare(self, cond):
        self.prepared += 1
        return cond

    def __call__(self, x, sigma, cond):
        self.calls.append((x, sigma, cond))
        return x * 0.5 + cond.concat


def test_the_scalings_are_those_of_v_prediction():
    sigma = torch.tensor([523.7, 3.21, 0.0137])
    s = scalings(sigma)
    torch.testing.assert_close(s.c_skip, 1 / (1 + sigma**2))
    torch.testing.assert_close(s.c_out, -sigma / (1 + sigma**2).sqrt())
    torch.testing.assert_close(s.c_in**2 * (1 + sigma**2), torch.ones(3))
    torch.testing.assert_close(s.c_noise, sigma.log() / 4)


def test_a_unet_denoiser_equals_the_formula_written_out(unet):
    x, sigma, cond = torch.randn(2, 3, 4, 4, 4), torch.tensor([3.0, 0.5]), condition(3, B=2)
    ours = UNetDenoiser(unet)(x, sigma, cond)
    for b in range(2):
        s = sigma[b]
        inputs = torch.cat([x[b] / (1 + s**2).sqrt(), cond.concat[b]], dim=1)
        tokens = unet.project_context(cond.crossattn[b], 3)
        out = unet(inputs, (s.log() / 4).expand(3), tokens, cond.vector[b], 3)
        slow = x[b] / (1 + s**2) - s / (1 + s**2).sqrt() * out
        torch.testing.assert_close(ours[b], slow, rtol=1e-4, atol=1e-5)


def test_cached_tokens_change_nothing(unet):
    denoiser, cond = UNetDenoiser(unet), condition(3)
    x, sigma = torch.randn(1, 3, 4, 4, 4), torch.tensor([3.0])
    prepared = denoiser.prepare(cond)
    assert prepared.tokens is not None
    assert torch.equal(denoiser(x, sigma, cond), denoiser(x, sigma, prepared))


def test_the_context_is_projected_once_for_the_run(unet):
    projected = []
    original = unet.project_context
    unet.project_context = lambda *args: projected.append(args) or original(*args)
    rows = Lines(UNetDenoiser(unet), [condition(3), condition(3, 1)], "rows")
    assert len(projected) == 4  # two rows, with and without the picture
    for sigma in (5.0, 1.0):
        rows(torch.randn(2, 3, 4, 4, 4), sigma)
    assert len(projected) == 4


def test_guidance_extrapolates_from_the_unconditional_estimate():
    estimate = Estimate(torch.tensor(1.0), torch.tensor(3.0))
    assert estimate.guided(torch.tensor(2.5)) == 6
    assert estimate.guided(torch.tensor(1.0)) == 3


def test_the_unconditional_half_stands_first_in_the_batch():
    spy, cond = Spy(), condition(3)
    x = torch.randn(1, 3, 4, 4, 4)
    estimate = Lines(spy, [cond], "rows")(x, 2.0)
    ((batch, sigma, both),) = spy.calls
    assert torch.equal(batch, torch.cat([x, x]))
    assert sigma.tolist() == [2, 2]
    assert not both.concat[0].any()
    assert torch.equal(both.concat[1], cond.concat[0])
    assert torch.equal(both.vector[0], both.vector[1])
    torch.testing.assert_close(estimate.cond - estimate.uncond, cond.concat)


@pytest.mark.parametrize("in_flight", [1, 2, 3, 7])
def test_every_row_and_column_meets_its_own_condition_for_any_number_in_flight(in_flight):
    V, F = 5, 3
    x = torch.randn(V, F, 4, 4, 4)
    rows = [condition(F, v) for v in range(V)]
    columns = [condition(V, 100 + f) for f in range(F)]
    row = Lines(Spy(), rows, "rows", in_flight)(x, 1.0)
    column = Lines(Spy(), columns, "columns", in_flight)(x, 1.0)
    torch.testing.assert_close(row.cond, x * 0.5 + torch.cat([c.concat for c in rows]))
    torch.testing.assert_close(column.cond, x * 0.5 + torch.cat([c.concat for c in columns]).transpose(0, 1))
    torch.testing.assert_close(column.uncond, x * 0.5)


def test_one_line_in_flight_gives_the_same_bits_however_lines_are_shared_out(unet):
    x = torch.randn(4, 3, 4, 4, 4)
    conditions = [condition(3, v) for v in range(4)]
    whole = Lines(UNetDenoiser(unet), conditions, "rows")(x, 3.0)
    for share in (slice(0, 1), slice(1, 4)):
        part = Lines(UNetDenoiser(unet), conditions[share], "rows")(x[share], 3.0)
        assert torch.equal(whole.cond[share], part.cond)


def test_the_wrong_number_of_conditions_is_refused():
    with pytest.raises(ValueError, match="3 rows and 2 conditions"):
        Lines(Spy(), [condition(2), condition(2)], "rows")(torch.randn(3, 2, 4, 4, 4), 1.0)


def test_blended_columns_see_their_neighbours_and_plain_ones_do_not(unet):
    x = torch.randn(3, 4, 4, 4, 4)  # V, F
    other = x.clone()
    other[:, 3] += 1
    conditions = [condition(3)] * 4
    for blend, seen in ((None, False), (Blend(0.6), True)):
        columns = Lines(UNetDenoiser(unet, blend), conditions, "columns", in_flight=4)
        change = (columns(x, 3.0).cond - columns(other, 3.0).cond).abs().transpose(0, 1).flatten(1).amax(1)
        assert change[3] > 1e-3
        assert bool(change[2] > 1e-4) is seen


def test_the_analytic_denoiser_is_the_posterior_mean():
    T, sigma = 3, 0.7
    root = torch.randn(T, T, generator=torch.Generator().manual_seed(0))
    covariance = root @ root.T
    mean = torch.randn(1, T, 4, 4, 4)
    cond = Conditioning(torch.zeros(1, T, 1), mean, torch.zeros(1, T, 1))
    x = torch.randn(1, T, 4, 4, 4)
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(T))
    slow = mean + torch.einsum("ij, bjchw -> bichw", gain, x - mean)
    ours = AnalyticDenoiser(covariance)(x, torch.tensor([sigma]), cond)
    torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("around", ["all", "last"])
def test_a_gated_denoiser_equals_the_formula_written_out(around):
    torch.manual_seed(0)
    unet = VideoUNet(dataclasses.replace(TINY, out_channels=8)).eval().requires_grad_(False)
    x, sigma, cond, sd = torch.randn(1, 3, 4, 4, 4), torch.tensor([0.8]), condition(3), 0.6
    ours = GatedDenoiser(unet, sd, around)(x, sigma, cond)[0]
    m = cond.concat[0].clone()
    if around == "last":
        m[:2] = 0
    rest, total = x[0] - m, 0.8**2 + sd**2
    inputs = torch.cat([rest / total**0.5, cond.concat[0]], dim=1)
    tokens = unet.project_context(cond.crossattn[0], 3)
    A, G = unet(inputs, (sigma.log() / 4).repeat(3), tokens, cond.vector[0], 3).chunk(2, dim=1)
    expected = m + sd**2 / total * (1 - G) * rest - 0.8 * sd / total**0.5 * A
    torch.testing.assert_close(ours, expected)


def test_without_guidance_the_unconditional_half_is_left_out_and_nothing_else_changes(unet):
    x, conditions = torch.randn(2, 3, 4, 4, 4), [condition(3, seed=s) for s in range(2)]
    pairs = Lines(UNetDenoiser(unet), conditions, "rows", in_flight=1)(x, 2.0)
    spy = Spy()
    alone = Lines(UNetDenoiser(unet), conditions, "rows", in_flight=1, guided_from=0.0)(x, 2.0)
    torch.testing.assert_close(alone.guided(torch.tensor(1.0)), pairs.guided(torch.tensor(1.0)))
    Lines(spy, conditions, "rows", in_flight=2, guided_from=0.0)(x, 2.0)
    assert spy.calls[0][0].shape[0] == 2
