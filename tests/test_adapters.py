"""Other models in the matrix: functions and foreign networks as denoisers."""

from __future__ import annotations

import pytest
import torch
from faults.assertions import expect_fault

from d2 import adapters
from d2.denoiser import Lines, scalings
from d2.models.conditioner import Conditioning, condition

SHAPE = (3, 4, 4, 8, 8)


def around(mean, spread):  # the documented example
    return lambda x, sigma: mean + spread**2 / (spread**2 + sigma**2) * (x - mean)


def settings(**more):
    return {"steps": 20, "vrs": "off", "sigma_max": 20.0} | more


def test_a_two_line_denoiser_gives_the_distribution_it_stands_for():
    one = adapters.rows(around(0.3, 0.5))
    latents = adapters.sample(one, one, (6, 6, 4, 16, 16), **settings(steps=60))
    assert latents.shape == (6, 6, 4, 16, 16)
    assert latents.mean().item() == pytest.approx(0.3, abs=0.02) and latents.std().item() == pytest.approx(
        0.5, rel=0.06
    )


def test_two_denoisers_are_composed_between_one_and_the_other():
    low, high = adapters.rows(around(0.0, 0.05)), adapters.columns(around(1.0, 0.05))
    means = adapters.sample(high, low, SHAPE, **settings()).mean((1, 2, 3, 4))
    assert ((means > 0.02) & (means < 0.98)).all()
    assert means[-1] < means[0]  # at the input view the frame model counts most


def test_the_same_seed_gives_the_same_matrix_and_columns_see_columns():
    one = adapters.rows(around(0.3, 0.5))
    a, b, c = (adapters.sample(one, one, SHAPE, seed, **settings()) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    seen = []
    adapters.columns(lambda x, sigma: seen.append(x.shape) or x)(torch.zeros(SHAPE), 1.0)
    assert seen == [torch.Size((4, 3, 4, 8, 8))]


def test_a_denoiser_of_another_shape_and_settings_out_of_range_are_one_line():
    one = adapters.rows(around(0.0, 1.0))
    expect_fault(lambda: adapters.sample(one, one, SHAPE, steps=0), 3, "steps")
    expect_fault(lambda: adapters.sample(one, one, (0, 4, 4, 8, 8)), 3, "shape")
    broken = adapters.rows(lambda x, sigma: x[:1])
    expect_fault(lambda: adapters.sample(broken, broken, SHAPE, **settings()), 3, "expected the same shape")
    expect_fault(lambda: adapters.sample(adapters.rows(lambda x, s: x / 0), one, SHAPE, **settings()), 6, "view model")


def conditions(lines: int, T: int) -> list[Conditioning]:
    g = torch.Generator().manual_seed(0)
    return [
        condition(torch.randn(1, 24, generator=g), torch.randn(1, 4, 8, 8, generator=g), torch.zeros(T, 24))
        for _ in range(lines)
    ]


class Recorder(torch.nn.Module):
    """Takes the words of diffusers' UNet and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, sample, timestep, encoder_hidden_states, added_time_ids, return_dict=True):
        self.given = sample, timestep, encoder_hidden_states, added_time_ids
        return (0.25 * sample[:, :, :4],)


def test_a_network_of_diffusers_gets_scaled_latents_the_reference_and_its_three_numbers():
    network, cond = Recorder(), conditions(2, 4)
    x = torch.randn(2, 4, 4, 8, 8)
    estimate = Lines(adapters.DiffusersFrames(network, 6.0, 100.0, 0.1), cond, "rows", in_flight=2)(x, 2.0)
    sample, timestep, token, numbers = network.given
    c_skip, c_out, c_in, c_noise = scalings(torch.tensor(2.0))
    assert sample.shape == (4, 4, 8, 8, 8) and torch.allclose(sample[2:, :, :4], c_in * x)
    assert torch.equal(sample[2:, :, 4:], torch.cat([c.concat for c in cond])) and (sample[:2, :, 4:] == 0).all()
    assert torch.allclose(timestep, c_noise.expand(4)) and token.shape == (4, 1, 24) and (token[:2] == 0).all()
    assert numbers.tolist() == [pytest.approx([6.0, 100.0, 0.1])] * 4
    assert torch.allclose(estimate.cond, c_skip * x + c_out * 0.25 * c_in * x, atol=1e-6)


def test_a_tiny_random_svd_of_diffusers_is_composed_with_another_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 32), num_attention_heads=(2, 2),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, layers_per_block=1,
        cross_attention_dim=24, num_frames=4,
    ).eval()  # fmt: skip
    frames = Lines(adapters.DiffusersFrames(unet), conditions(3, 4), "rows")
    latents = adapters.sample(adapters.rows(around(0.3, 0.5)), frames, SHAPE, steps=3)
    assert latents.shape == SHAPE and latents.isfinite().all()
