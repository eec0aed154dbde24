import subprocess
import sys

import pytest
import torch

from d2.noise import cell_noise, freeinit_noise, matrix_noise, mix_frequencies, starting_point
from d2.schedule import low_pass


def test_noise_of_a_cell_is_the_same_whatever_is_drawn_around_it():
    alone = cell_noise(23, "renoise", 4, (2, 1), (4, 8, 8))
    torch.randn(1000)
    torch.manual_seed(99)
    whole = matrix_noise(23, "renoise", 4, V=3, F=2, shape=(4, 8, 8))
    assert whole.shape == (3, 2, 4, 8, 8)
    assert torch.equal(whole[2, 1], alone)


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    cell_noise(0, "start", 0, (0, 0), (4,))
    assert torch.equal(torch.randn(3), expected)


def test_noise_is_the_same_in_another_process():
    code = "from d2.noise import cell_noise; print(cell_noise(23, 'start', 0, (1, 2), (3,)).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cell_noise(23, "start", 0, (1, 2), (3,)).tolist())


@pytest.mark.parametrize(
    "other",
    [
        (24, "a", 0, (1, 2)),
        (23, "b", 0, (1, 2)),
        (23, "a", 1, (1, 2)),
        (23, "a", 0, (2, 1)),
        (23, "a", 0, (12,)),
    ],
)
def test_noise_differs_with_seed_stream_step_and_cell(other):
    first = cell_noise(23, "a", 0, (1, 2), (4, 16, 16))
    seed, stream, step, cell = other
    second = cell_noise(seed, stream, step, cell, (4, 16, 16))
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.15


def test_noise_is_standard_normal_and_independent_between_cells():
    x = matrix_noise(1, "start", 0, 8, 8, (4, 16, 16)).flatten(2).flatten(0, 1)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert (torch.corrcoef(x) - torch.eye(64)).abs().max() < 0.15


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, 2**62])
def test_any_seed_makes_noise(seed):
    assert cell_noise(seed, "start", 0, (0, 0), (4,)).isfinite().all()


def test_noise_starts_at_the_first_level_or_around_the_reference_latent():
    noise, latent, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 1, 4, 2, 2), 700.0
    torch.testing.assert_close(starting_point(noise, sigma), noise * (1 + sigma**2) ** 0.5)
    mixed = (latent + noise * sigma) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(starting_point(noise, sigma, latent), starting_point(mixed, sigma))


def test_mixing_with_itself_changes_nothing():
    x = torch.randn(5, 6, 8)
    torch.testing.assert_close(mix_frequencies(x, x, low_pass((5, 6, 8)), (0, 1, 2)), x, rtol=1e-4, atol=1e-5)


def test_mixing_takes_low_frequencies_from_one_and_high_ones_from_the_other():
    slow = torch.ones(4, 6, 8)
    fast = torch.tensor([1.0, -1.0]).repeat(4, 6, 4)
    mask = low_pass((4, 6, 8))
    torch.testing.assert_close(mix_frequencies(slow, fast, mask, (0, 1, 2)), slow + fast, rtol=0, atol=1e-4)
    assert mix_frequencies(fast, slow, mask, (0, 1, 2)).abs().max() < 1e-3


@pytest.mark.parametrize("V", [1, 3])
def test_freeinit_of_a_matrix_keeps_the_layout_of_one(V):
    sample, noise, fresh = torch.randn(3, V, 4, 2, 6, 8)
    sigma = 700.0
    mask = low_pass((V, 4, 6, 8))
    ours = freeinit_noise(sample, noise, fresh, sigma, mask)
    noised = (sample + noise * sigma) / (1 + sigma**2) ** 0.5
    for c in range(2):
        slow = mix_frequencies(noised[:, :, c], fresh[:, :, c], mask, (0, 1, 2, 3))
        torch.testing.assert_close(ours[:, :, c], slow, rtol=1e-4, atol=1e-5)


def test_freeinit_noise_still_has_the_variance_of_noise():
    sample, noise, fresh = (
        0.5 * torch.randn(8, 4, 16, 16),
        torch.randn(8, 4, 16, 16),
        torch.randn(8, 4, 16, 16),
    )
    ours = freeinit_noise(sample, noise, fresh, 700.0, low_pass((8, 16, 16)))
    assert ours.shape == sample.shape
    assert 0.9 < ours.std() < 1.02
