"""What a plan says against what happens: live bytes against the process's own peak, arithmetic, what saves memory."""

import ctypes
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from d2 import budget
from d2.config import load, preset_path
from d2.denoiser import Lines, UNetDenoiser
from d2.launch import execution
from d2.models.blocks import FeedForward
from d2.models.conditioner import Conditioning
from d2.models.offload import Offload
from d2.models.unet import VideoUNet
from d2.pair import Execution, load_models
from d2.sampler import SamplerConfig, plan
from d2.settings import GenerateConfig

CPU = torch.device("cpu")
OFFICIAL = GenerateConfig()
MIDDLE = GenerateConfig(
    unet_channels=64, unet_mult=(1, 2), unet_blocks=1, unet_attention=(1, 2), clip_output=32, embedding=16,
    views=4, frames=4, size=192,
)  # fmt: skip


def network(settings, model="frame"):
    torch.manual_seed(0)
    return VideoUNet(settings.spec(model).unet).eval().requires_grad_(False)


def line(settings, T, halves=False):
    config, (c, h, w) = settings.spec("frame").unet, settings.latent
    cond = Conditioning(
        torch.randn(1, T, config.context_dim), torch.randn(1, T, c, h, w), torch.randn(1, T, 3 * settings.embedding)
    )
    return Lines(UNetDenoiser(network(settings)), [cond], "rows", halves=halves)


def peak_rss():
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def test_the_plans_peak_is_what_a_middle_sized_network_takes(one_thread):
    rows, x = line(MIDDLE, 4), torch.randn(1, 4, *MIDDLE.latent)
    reset = Path("/proc/self/clear_refs")
    try:
        rows(x, 2.0)  # libraries make their own room
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        pytest.skip("the kernel does not let a process reset its peak")
    before = peak_rss()
    rows(x, 2.0)
    took, planned = peak_rss() - before, budget.evaluation(MIDDLE, "frame", Execution()).peak
    assert 0.6 * planned < took < budget.SLACK * 1.3 * planned


@pytest.fixture(scope="module")
def official():
    """One evaluation of SVD-XT on a row, with its guidance pair, in bfloat16."""
    return budget.evaluation(OFFICIAL, "frame", Execution(torch.bfloat16))


def test_the_arithmetic_of_the_official_pair_is_that_of_its_specification(official):
    tera = official.flops / 50 / 1e12  # of a picture
    assert tera == pytest.approx(1.646 * (1 - 0.041), rel=0.01)  # cross-attention to one token is constant
    assert official.weights == pytest.approx(3.05e9, rel=0.01)
    line = {"view": 42 * int(1e12), "frame": 50 * int(1e12)}
    total, slowest = budget.joint_loop(OFFICIAL, line, 8)
    assert total == pytest.approx(126_000e12)  # forwards of pictures in 50 + 10 evaluations
    assert 0.94 < total / 8 / slowest <= 1
    assert budget.joint_loop(OFFICIAL, line, 1) == (total, total)
    cached = dataclasses.replace(OFFICIAL, step_cache=2)
    assert budget.joint_loop(cached, line, 1, dict.fromkeys(line, 0))[0] == pytest.approx(total / 2)


def test_low_vram_stays_below_8_gb_and_below_12_without_feed_forward_chunks(official):
    low = load(GenerateConfig, preset_path("low-vram", "generate"))
    how = dataclasses.replace(execution(low, CPU), dtype=torch.bfloat16)
    assert how.offload and how.halves and how.feed_forward_chunk
    chunked = budget.evaluation(low, "frame", how)
    whole = budget.evaluation(low, "frame", dataclasses.replace(how, feed_forward_chunk=0))
    assert chunked.peak < whole.peak < official.peak
    drawing, look = budget.decoding(low), budget.looking(low)
    one, two = (
        budget.memory(low, how, {"view": found, "frame": found}, drawing, look, 1, "cuda") for found in (chunked, whole)
    )
    assert one.peak < 8e9 < two.peak < 12e9
    cached = dataclasses.replace(low, step_cache=2)
    cache = budget.memory(cached, how, {"view": chunked, "frame": chunked}, drawing, look, 1, "cuda").step_cache
    assert cache == 320 * 72 * 72 * 2 * (25 * 25 + 21 * 25) * 2  # halves of 25 columns (as long as rows) and 21 rows
    assert 7 < cache / budget.step_cache(cached, how, {"view": chunked, "frame": chunked}, ranks=8) <= 8


def test_a_network_in_half_the_precision_takes_half_the_memory():
    half, whole = (budget.evaluation(MIDDLE, "frame", Execution(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert half.peak / whole.peak == pytest.approx(0.5, abs=0.01)


def test_lines_in_flight_are_what_free_memory_holds_and_one_on_a_cpu(monkeypatch):
    monkeypatch.setattr(budget, "evaluation", lambda *words: budget.Evaluation(0, int(10e9), int(3e9)))
    assert (budget.fitted(OFFICIAL, CPU).rows_in_flight, budget.fitted(OFFICIAL, CPU).columns_in_flight) == (1, 1)
    for free, lines in ((80e9, 4), (32e9, 2), (8e9, 1)):
        monkeypatch.setattr(budget, "free_memory", lambda device, free=free: free)
        there = budget.fitted(OFFICIAL, torch.device("cuda"))
        assert (there.columns_in_flight, there.rows_in_flight) == (lines, lines)
    asked = dataclasses.replace(OFFICIAL, rows_in_flight=7)
    assert budget.fitted(asked, CPU).rows_in_flight == 7


def test_a_dry_run_tells_its_plan_needs_no_weights_and_writes_nothing(run_cli, ball, tmp_path):
    done = run_cli(
        "generate",
        ball,
        "--preset",
        "tiny",
        "--set",
        "step_cache=2",
        "--dry-run",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    )
    assert done.code == 0, done.stderr
    assert re.search(r"memory: \d+\.\d GB at most of .* GB free: fits", done.stdout)
    assert all(word in done.stdout for word in ("PFLOP", "in flight", "time: about", "and the step cache 0.0 GB"))
    assert re.search(r"on a GPU: \d\.\d GB: fits 6 GB", done.stdout)
    assert not (tmp_path / "run").exists()
    assert run_cli("generate", tmp_path / "none.png", "--dry-run").code == 3


def test_halves_of_a_pair_in_turn_give_what_both_give_at_once():
    x = torch.randn(1, 3, *MIDDLE.latent)[..., :16, :16]
    settings = dataclasses.replace(MIDDLE, size=128)
    torch.manual_seed(1)
    at_once = line(settings, 3)
    in_turn = Lines(at_once.denoiser, [], "rows", halves=True)
    in_turn.cond, in_turn.uncond = at_once.cond, at_once.uncond
    for ours, theirs in zip(in_turn(x, 2.0), at_once(x, 2.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_feed_forward_layer_in_chunks_is_the_same_layer(chunk):
    layer, x = FeedForward(16), torch.randn(3, 5, 16)
    whole = layer(x)
    layer.chunk = chunk
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)


def test_offloading_covers_every_weight_in_the_order_of_running_and_takes_turns(monkeypatch, tiny):
    unet = network(dataclasses.replace(MIDDLE, size=64))
    offload = Offload(unet, CPU)
    assert offload.blocks[0] is unet.time_embed
    assert len(offload.blocks) == len(unet.input_blocks) + len(unet.output_blocks) + 4
    with pytest.raises(AssertionError, match="belongs to no block"):
        unet.register_parameter("stray", nn.Parameter(torch.zeros(1)))
        Offload(unet, CPU)
    turns = []
    monkeypatch.setattr(Offload, "fetch", lambda self, whole=False: turns.append("whole" if whole else "fetch"))
    monkeypatch.setattr(Offload, "release", lambda self: turns.append("release"))
    settings = load(GenerateConfig, tiny / "preset.yaml")
    pair = load_models(settings, tiny, CPU, Execution(offload=True))
    cond = Conditioning(torch.randn(1, 3, 24), torch.randn(1, 3, *settings.latent), torch.randn(1, 3, 24))
    rows = pair.lines("frame", [cond])
    for _ in range(2):
        rows(torch.randn(1, 3, *settings.latent), 2.0)
    assert turns == ["release", "whole", "release", "fetch", "release", "fetch", "release"]


@pytest.mark.parametrize(("sets", "first"), [
    ({}, math.inf),
    ({"svd_cfg_warmup": True}, 1),  # at the first step the guidance is 1
    ({"svd_cfg_warmup": True, "guidance_skip": 1.0}, 3),  # 3 frames of up to 3: |g - 1| = 2·q, more than 1 from q = 3/4
    ({"guidance_skip": 2.0}, 0.0),
])  # fmt: skip
def test_the_unconditional_half_is_skipped_while_guidance_is_within_the_threshold_of_1(sets, first):
    worked_out = plan(SamplerConfig(steps=5, **sets), torch.linspace(0, 6, 4), 3)
    expected = worked_out.sigmas[first].item() if isinstance(first, int) and first else first
    assert worked_out.guided_from("frame") == expected


def test_above_the_level_from_which_it_is_guided_a_line_is_evaluated_alone():
    calls = []

    class Spy:
        def prepare(self, cond):
            return cond

        def __call__(self, x, sigma, cond):
            calls.append(len(x))
            return x + cond.concat

    cond = Conditioning(torch.zeros(1, 2, 3), torch.ones(1, 2, 4, 2, 2), torch.zeros(1, 2, 3))
    lines = Lines(Spy(), [cond], "rows", guided_from=5.0)
    above, below = (lines(torch.zeros(1, 2, 4, 2, 2), sigma) for sigma in (5.1, 5.0))
    assert calls == [1, 2]
    assert torch.equal(above.uncond, above.cond) and not torch.equal(below.uncond, below.cond)
    assert torch.equal(above.cond, below.cond)
