"""Other models in the matrix: functions and foreign networks as denoisers."""

from __future__ import annotations

import pytest
import torch
from faults.assertions import expect_fault
from watched import bits, stop_at

from d2 import adapters
from d2.config import load
from d2.denoiser import Lines, scalings
from d2.errors import ConflictError, Stopped
from d2.models import weights
from d2.models.conditioner import Conditioning, condition
from d2.models.diffusers import origins
from d2.pair import load_models
from d2.run import Run
from d2.settings import GenerateConfig

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
    expect_fault(lambda: adapters.sample(broken, broken, SHAPE, **settings()), 3, "expected a tensor of the same shape")
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


# -- in d2.generate ----------------------------------------------------------------------------------------------------

UNGUIDED = ("frame_guidance_min=1", "frame_guidance_max=1", "view_guidance_min=1", "view_guidance_max=1")
FRAME_ALONE = ("scale=0", "svd_only_from=-1")


def cells(folder) -> torch.Tensor:  # [3, 3, 3, 64, 64]
    return Run.open(folder).matrix().tensor(range(3), range(3))


def still(x, sigma, cond):  # the documented example
    gain = 0.05**2 / (0.05**2 + sigma**2)
    return cond.concat + gain[:, None, None, None, None] * (x - cond.concat)


def test_a_function_takes_the_place_of_the_frame_model_in_a_whole_run(tiny, generate, ball, tmp_path):
    seen = []

    def level(x, sigma, cond):
        seen.append((x.shape, sigma.shape, cond.concat.shape, cond.crossattn.shape[:2], bool(cond.concat.any())))
        return torch.full_like(x, 0.3)

    folder = generate(ball, tmp_path / "run", frame_denoiser=level, sets=(*UNGUIDED, *FRAME_ALONE)).folder
    assert set(seen) == {((1, 3, 4, 8, 8), (1,), (1, 3, 4, 8, 8), (1, 3), True)}  # no guidance: always with its picture
    stage = Run.open(folder).stage("generate")
    assert set(stage["models"]) == {"tiny_view.safetensors", "tiny_frame.safetensors", level.__qualname__}
    pair = load_models(load(GenerateConfig, tiny / "preset.yaml"), tiny)
    expected = pair.first_stage("frame").decode(torch.full((3, 4, 8, 8), 0.3), 10)
    assert all((row - expected).abs().max() < 1.5 / 255 for row in cells(folder))


def test_two_functions_make_a_run_without_the_view_checkpoint_that_resumes_to_the_same_bits(
    tiny, generate, ball, tmp_path
):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "tiny_frame.safetensors").symlink_to(tiny / "tiny_frame.safetensors")
    own = {"view_denoiser": still, "frame_denoiser": still, "weights": folder}
    own["sets"] = (*UNGUIDED, "step_cache=2")  # of networks: a function's insides are its own
    generate(ball, tmp_path / "whole", **own)
    with pytest.raises(Stopped, match=r"go on with: the same call of d2\.generate"):
        generate(ball, tmp_path / "halves", **own, **stop_at("matrix", 2))
    other = own | {"frame_denoiser": lambda x, sigma, cond: still(x, sigma, cond)}
    with pytest.raises(ConflictError, match="frame_denoiser: 'still' ->"):
        generate(ball, tmp_path / "halves", **other)
    generate(ball, tmp_path / "halves", **own)
    assert bits(tmp_path / "whole") == bits(tmp_path / "halves")
    expect_fault(lambda: generate(ball, tmp_path / "none", frame_denoiser=still, weights=folder), 4, "tiny_view")


def test_what_a_function_of_ones_own_cannot_do_is_one_line(generate, ball, tmp_path):
    out = tmp_path / "run"
    expect_fault(lambda: generate(ball, out, view_denoiser=still, processes=2), 3, "stays in its process")
    expect_fault(lambda: generate(ball, out, view_denoiser=still, sets=("conv_blend=0.6",)), 3, "conv_blend")
    expect_fault(
        lambda: generate(ball, out, view_denoiser=lambda x, s, c: x[:, 1:]), 3, "expected a tensor of the same"
    )
    expect_fault(lambda: generate(ball, out, view_denoiser=lambda x, s, c: None, overwrite=True), 3, "NoneType")
    nothing = lambda x, s, c: x * float("nan")  # noqa: E731
    expect_fault(lambda: generate(ball, out, frame_denoiser=nothing, overwrite=True), 6, "frame")


def test_the_unet_of_a_diffusers_pipeline_makes_the_rows_of_a_run_as_our_own_does(tiny, generate, ball, tmp_path):
    """The same weights, in d2's network and through DiffusersFrames in diffusers'."""
    diffusers = pytest.importorskip("diffusers")
    spec = load(GenerateConfig, tiny / "preset.yaml").spec("frame")
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), num_attention_heads=(2, 2), addition_time_embed_dim=8, layers_per_block=1,
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=24, cross_attention_dim=24, num_frames=3,
    ).eval()  # fmt: skip
    ours = {
        f"model.diffusion_model.{k}": v
        for k, v in weights.load(weights.find(spec, tiny), spec, "unet").state_dict().items()
    }
    made = origins({name: tuple(tensor.shape) for name, tensor in ours.items()}, 1, 4)
    unet.load_state_dict({origin.names[0].removeprefix("unet/"): ours[name] for name, origin in made.items()})
    foreign = generate(ball, tmp_path / "foreign", frame_denoiser=adapters.DiffusersFrames(unet))
    own = generate(ball, tmp_path / "own")
    assert (cells(foreign.folder) - cells(own.folder)).abs().max() <= 1.5 / 255
