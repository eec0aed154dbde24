import pytest
import torch

from d2.compose import Weights, compose, needed, weights
from d2.denoiser import Estimate
from d2.schedule import frame_share

SHAPE = 4, 3, 2, 2, 2  # V F C h w
VIEW = Estimate(torch.randn(SHAPE), torch.randn(SHAPE))
FRAME = Estimate(torch.randn(SHAPE), torch.randn(SHAPE))
VIEW_GUIDANCE = torch.tensor([1.0, 2.0, 2.5, 3.0])
FRAME_GUIDANCE = torch.tensor([1.5, 2.0, 3.0])
SHARE = frame_share(torch.tensor([0.3, 1.5, 3.1, 6.28]))


def slow(view_uncond, frame_uncond, s):
    """The formula of the reference, cell by cell."""
    out = torch.empty(SHAPE)
    for v in range(4):
        for f in range(3):
            d3 = view_uncond[v, f] + VIEW_GUIDANCE[v] * (VIEW.cond[v, f] - view_uncond[v, f])
            ds = frame_uncond[v, f] + FRAME_GUIDANCE[f] * (FRAME.cond[v, f] - frame_uncond[v, f])
            out[v, f] = (1 - SHARE[v] + SHARE[v] * s) * d3 + SHARE[v] * (1 - s) * ds
    return out


@pytest.mark.parametrize("kind", ["default", "sv3d", "svd", "mean"])
def test_the_composed_estimate_equals_the_formula_cell_by_cell(kind):
    mean = (VIEW.uncond + FRAME.uncond) / 2
    uncond = {
        "default": (VIEW.uncond, FRAME.uncond),
        "sv3d": (VIEW.uncond, VIEW.uncond),
        "svd": (FRAME.uncond, FRAME.uncond),
        "mean": (mean, mean),
    }[kind]
    ours = compose(VIEW, FRAME, weights(SHARE, 0.6), VIEW_GUIDANCE, FRAME_GUIDANCE, kind)
    torch.testing.assert_close(ours, slow(*uncond, 0.6), rtol=1e-5, atol=1e-5)


def test_weights_of_both_models_add_up_to_one_in_every_view():
    for scale in (0.0, 0.3, 1.0):
        for frame_only in (False, True):
            w = weights(SHARE, scale, frame_only)
            torch.testing.assert_close(w.view + w.frame, torch.ones(4))


def test_a_scale_of_one_is_the_view_model_alone_and_frame_only_is_the_frame_model_alone():
    alone = compose(VIEW, None, weights(SHARE, 1.0), VIEW_GUIDANCE, FRAME_GUIDANCE)
    torch.testing.assert_close(alone, VIEW.guided(VIEW_GUIDANCE[:, None, None, None, None]))
    alone = compose(None, FRAME, weights(SHARE, 0.6, True), VIEW_GUIDANCE, FRAME_GUIDANCE)
    torch.testing.assert_close(alone, FRAME.guided(FRAME_GUIDANCE[:, None, None, None]))


ONLY_VIEW, ONLY_FRAME = weights(SHARE, 1.0), weights(SHARE, 0.5, True)


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        (weights(SHARE, 0.6), "default", (True, True)),
        (ONLY_VIEW, "default", (True, False)),
        (ONLY_FRAME, "default", (False, True)),
        (ONLY_VIEW, "sv3d", (True, False)),
        (ONLY_VIEW, "svd", (True, True)),
        (ONLY_VIEW, "mean", (True, True)),
        (ONLY_FRAME, "svd", (False, True)),
        (ONLY_FRAME, "sv3d", (True, True)),
        (ONLY_FRAME, "mean", (True, True)),
        (Weights(torch.zeros(4), torch.ones(4)), "default", (False, True)),
    ],
)
def test_a_model_is_needed_where_it_has_weight_or_lends_its_unconditional_estimate(given, kind, expected):
    assert needed(given, kind) == expected


def test_a_model_without_weight_may_still_lend_its_unconditional_estimate():
    ours = compose(VIEW, FRAME, ONLY_FRAME, VIEW_GUIDANCE, FRAME_GUIDANCE, "sv3d")
    expected = Estimate(VIEW.uncond, FRAME.cond).guided(FRAME_GUIDANCE[:, None, None, None])
    torch.testing.assert_close(ours, expected)
