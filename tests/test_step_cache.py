"""Reused deep features: what is computed, when, and that a run with them is the same whoever makes it."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from watched import bits, stop_at

from d2.config import load
from d2.errors import Stopped
from d2.models.unet import Deep, UNetConfig, VideoUNet
from d2.pair import model_angles
from d2.run import Run
from d2.sampler import SamplerConfig, plan
from d2.settings import GenerateConfig

CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_head_channels=16,
    context_dim=12,
    adm_in_channels=20,
)


def shallow_steps(model, **options):
    worked_out = plan(SamplerConfig(**options), model_angles(4), 3)
    return [step for step, sigma in enumerate(worked_out.sigmas.tolist()) if sigma in worked_out.shallow_at(model)]


@pytest.mark.parametrize("attention", [(1, 2), (2,)])  # with and without a transformer in the last stage
def test_a_shallow_evaluation_at_the_same_input_gives_the_same_bits_for_a_part_of_the_work(attention):
    torch.manual_seed(0)
    unet = VideoUNet(UNetConfig(**(vars(CONFIG) | {"attention_resolutions": attention}))).requires_grad_(False)
    x, tokens = torch.randn(3, 8, 8, 8), unet.project_context(torch.randn(3, 12), 3)
    words, deep, flops = (torch.zeros(3), tokens, torch.randn(3, 20), 3), Deep(), []
    outputs = [unet(x, *words)]
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            outputs.append(unet(x, *words, deep=deep))
        flops.append(counter.get_total_flops())
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    assert flops[1] < flops[0] / 3
    assert not torch.equal(unet(2 * x, *words, deep=deep), outputs[0])  # the new input is looked at


def test_every_nth_level_is_whole_and_so_are_those_where_the_old_features_do_not_fit():
    assert shallow_steps("view", steps=8) == shallow_steps("frame", steps=8) == []
    assert shallow_steps("view", steps=8, step_cache=3) == [1, 2, 4, 5, 7]
    assert shallow_steps("view", steps=8, step_cache=3, svd_only_from=0.5) == [
        1,
        2,
        5,
        7,
    ]  # step 4 is the frame model's
    assert shallow_steps("frame", steps=8, step_cache=9, svd_cfg_warmup=True) == [
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # guided from step 1


def test_the_default_reuses_nothing():
    assert load(GenerateConfig).step_cache == 1


def test_a_run_with_reused_features_differs_a_little_and_goes_on_to_the_same_bits_from_any_step(
    generate, clip, finished, tmp_path, monkeypatch
):
    whole = []
    below = VideoUNet._below_the_last
    monkeypatch.setattr(VideoUNet, "_below_the_last", lambda self, *words: whole.append(1) or below(self, *words))
    generate(clip, tmp_path / "whole", sets=("step_cache=2",))
    assert len(whole) == 2 + 3 * 6  # levels 0 and 2; of the joint loop's six lines the first is taken twice
    pictures = [
        Run.open(folder).matrix().tensor([0, 1], [0, 1, 2]).numpy() for folder in (finished, tmp_path / "whole")
    ]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 0.1
    with pytest.raises(Stopped, match="at step 0 of 3"):
        generate(clip, tmp_path / "halves", sets=("step_cache=2",), **stop_at("matrix", 2))
    generate(clip, tmp_path / "halves", sets=("step_cache=2",))
    assert bits(tmp_path / "halves") == bits(tmp_path / "whole")
