import math
import time

import pytest
import torch

from d2.schedule import (
    composition_scale,
    edm_sigmas,
    frame_share,
    linear_guidance,
    low_pass,
    progress,
    triangle_guidance,
    warmed_up,
)


def test_noise_levels_fall_from_the_first_to_the_last_and_then_to_zero():
    sigmas = edm_sigmas(50)
    assert len(sigmas) == 51
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[[0, -2]], torch.tensor([700.0, 0.002]), rtol=1e-5, atol=0)


def test_noise_levels_equal_the_formula_in_double_precision():
    n, rho = 30, 7.0
    high, low = 700 ** (1 / rho), 0.002 ** (1 / rho)
    formula = [(high + i / (n - 1) * (low - high)) ** rho for i in range(n)]
    torch.testing.assert_close(edm_sigmas(n)[:-1].double(), torch.tensor(formula).double(), rtol=5e-6, atol=0)


def test_one_step_goes_from_the_first_level_to_zero():
    torch.testing.assert_close(edm_sigmas(1), torch.tensor([700.0, 0.0]))
    assert progress(0, 1) == 0


def test_the_reference_guides_frames_from_1_5_to_3_and_views_by_2_5_throughout():
    scales = linear_guidance(1.5, 3.0, 25)
    assert (scales[0], scales[12], scales[24]) == (1.5, 2.25, 3.0)
    assert (triangle_guidance(2.5, 2.5, 21) == 2.5).all()


def test_triangle_guidance_is_low_at_the_input_view_and_high_behind_the_object():
    assert triangle_guidance(1, 4, 9).tolist() == [1, 1.75, 2.5, 3.25, 4, 3.25, 2.5, 1.75, 1]


def test_guidance_warms_up_from_none_to_its_own_value():
    guidance = torch.tensor([1.5, 3.0])
    assert warmed_up(guidance, 0, 5).tolist() == [1, 1]
    assert warmed_up(guidance, 2, 5).tolist() == [1.25, 2]
    torch.testing.assert_close(warmed_up(guidance, 4, 5), guidance)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_falling_schedule_starts_at_its_maximum_and_ends_at_its_minimum(kind):
    values = [composition_scale(kind, q, low=0.2, high=0.9) for q in torch.linspace(0, 1, 11).tolist()]
    assert values[0] == pytest.approx(0.9)
    assert values[-1] == pytest.approx(0.2)
    assert values[5] == pytest.approx(0.55)
    assert values == sorted(values, reverse=True)


def test_a_constant_schedule_is_its_scale_and_a_logistic_one_is_halfway_there():
    assert composition_scale("constant", 0.3, scale=0.6) == 0.6
    assert composition_scale("logistic", 0.6, scale=0.6) == pytest.approx(0.5)
    assert composition_scale("logistic", 0.0, scale=1.0, k=1000) == 1
    assert composition_scale("logistic", 0.0, scale=0.6, k=15) == pytest.approx(1 - 1 / (1 + math.exp(9)))


def test_the_frame_model_counts_fully_at_the_front_and_back_and_a_quarter_at_the_side():
    azimuth = torch.deg2rad(torch.tensor([0.0, 90.0, 180.0, 270.0, 45.0]))
    torch.testing.assert_close(frame_share(azimuth), torch.tensor([1, 0.25, 1, 0.25, 0.625]))


@pytest.mark.parametrize("V", [1, 3, 5, 21, 40])
def test_any_number_of_views_has_shares_that_mirror_front_and_side(V):
    share = frame_share(torch.linspace(0, 2 * math.pi, V + 1)[1:])
    assert len(share) == V
    assert share[-1] == 1
    torch.testing.assert_close(share[:-1], share[:-1].flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["butterworth", "gaussian", "ideal", "box"])
@pytest.mark.parametrize("shape", [(5, 6, 8), (3, 4, 6, 8)])
def test_a_low_pass_keeps_the_constant_and_little_of_the_fastest(kind, shape):
    mask = low_pass(shape, kind)
    middle = tuple(n // 2 for n in shape)
    assert mask.shape == shape
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask[(0,) * len(shape)] < 0.01
    if shape[-3] % 2 == 0 and kind != "box":  # an odd axis has no point at zero frequency
        assert low_pass((4, 6, 8), kind)[2, 3, 4] == 1
    assert mask[middle] >= mask[(0,) * len(shape)]


def test_the_butterworth_filter_equals_its_slow_twin():
    T, h, w, n, d_s, d_t = 5, 6, 8, 2, 0.3, 0.6
    ours = low_pass((T, h, w), "butterworth", n, d_s, d_t)
    for t in range(T):
        for y in range(h):
            for x in range(w):
                square = ((d_s / d_t) * (2 * t / T - 1)) ** 2 + (2 * y / h - 1) ** 2 + (2 * x / w - 1) ** 2
                assert ours[t, y, x].item() == pytest.approx(1 / (1 + (square / d_s**2) ** n), rel=1e-5)


def test_views_and_frames_are_filtered_alike():
    mask = low_pass((4, 4, 6, 8), temporal=0.5)
    assert torch.equal(mask, mask.transpose(0, 1))
    assert torch.equal(mask[2], low_pass((4, 6, 8), temporal=0.5))


def test_a_stop_frequency_of_zero_keeps_nothing():
    assert not low_pass((4, 6, 8), temporal=0).any()
    assert not low_pass((4, 6, 8), spatial=0).any()


def test_the_filter_of_a_full_matrix_is_made_by_broadcasting_not_point_by_point():
    start = time.process_time()
    mask = low_pass((21, 25, 72, 72))
    assert time.process_time() - start < 5  # the reference takes 55
    assert mask.shape == (21, 25, 72, 72)
    assert mask.dtype == torch.float32
