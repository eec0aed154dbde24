"""What holds for any matrix, any schedule, any way to share out the work, any picture and any file name."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from faults.examples import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d2 import fileio, images, inputs, preprocess
from d2.denoiser import AnalyticDenoiser, Lines
from d2.errors import D2Error
from d2.models.conditioner import Conditioning
from d2.noise import matrix_noise, starting_point
from d2.sampler import SamplerConfig, State, plan, sample_matrix

SIDES = st.integers(1, 90)
MODES = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40)
CONFIGS = st.builds(
    SamplerConfig,
    steps=st.integers(1, 5),
    method=st.sampled_from(["euler", "heun", "dpmpp2m"]),
    vrs=st.sampled_from(["reference", "exact", "off"]),
    vrs_steps=st.integers(0, 4),
    composition=st.sampled_from(["constant", "linear", "cosine", "logistic"]),
    uc_type=st.sampled_from(["default", "mean"]),
    svd_cfg_warmup=st.booleans(),
    sigma_max=st.floats(1, 700),
)


def sampled(config, V, F, seed, in_flight=(1, 1), state=None, states=None):
    """The matrix [V, F, 2, 3, 2] of an analytic pair with smooth priors around a random mean."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(V, F, 2, 3, 2, generator=generator)
    lines = [
        Lines(AnalyticDenoiser(prior(len(means[0]))), [condition(m) for m in means], axis, in_flight=count)
        for means, axis, count in zip((mean.transpose(0, 1), mean), ("columns", "rows"), in_flight, strict=True)
    ]
    worked_out = plan(config, torch.linspace(0, 2 * math.pi, V + 1)[1:], F)
    noise = matrix_noise(seed, "start", 0, V, F, (2, 3, 2))
    begin = State(starting_point(noise, float(worked_out.sigmas[0]))) if state is None else state
    again = lambda step: matrix_noise(seed, "again", step, V, F, (2, 3, 2))  # noqa: E731
    return sample_matrix(begin, worked_out, *lines, again, (states if states is not None else []).append)


def prior(n):
    t = torch.arange(n)
    return torch.exp(-((t[:, None] - t) ** 2) / 4.0) + 0.05 * torch.eye(n)


def condition(mean):
    return Conditioning(torch.zeros(1, len(mean), 1), mean[None], torch.zeros(1, len(mean), 1))


@examples(25)
@given(config=CONFIGS, V=st.integers(1, 6), F=st.integers(1, 6), seed=st.integers(0, 2**62), at=st.integers(0, 100))
def test_any_matrix_resumes_from_any_state_to_the_same_bits(config, V, F, seed, at):
    states = []
    whole = sampled(config, V, F, seed, states=states)
    assert whole.shape == (V, F, 2, 3, 2) and whole.isfinite().all()
    assert torch.equal(sampled(config, V, F, seed, state=states[at % len(states)]), whole)


@examples(10)
@given(config=CONFIGS, V=st.integers(1, 6), F=st.integers(1, 6), counts=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_any_number_of_lines_in_flight_changes_nothing_but_rounding(config, V, F, counts):
    one, many = sampled(config, V, F, 3), sampled(config, V, F, 3, in_flight=counts)
    assert (many - one).abs().max() <= 1e-5 * config.steps * 2 * max(1, one.abs().max())


@examples(60)
@given(
    width=SIDES, height=SIDES, mode=MODES, suffix=st.sampled_from([".png", ".tif"]), name=NAMES, seed=st.integers(0, 99)
)
def test_any_picture_of_any_mode_and_name_becomes_squares_or_one_line(width, height, mode, suffix, name, seed):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    levels[: height // 3, :, 3] = 0
    picture = Image.fromarray(levels)
    picture = picture.convert("L").convert(mode) if mode.startswith("I") else picture.convert("RGB").convert(mode)
    picture = Image.fromarray(levels) if mode == "RGBA" else picture
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (name.encode()[:200].decode(errors="ignore") + suffix)
        try:
            picture.save(path)
        except (OSError, KeyError, ValueError):
            return  # Pillow has no such file
        try:
            clip = inputs.read(path, 3, notice=lambda text: None)
            inputs.require_foreground(clip)
            squares = preprocess.squares(clip.pictures, 0.9, "clip", 24)
        except D2Error as error:
            assert str(error).isprintable() and error.exit_code == 3
            return
    assert {square.size for square in squares} == {(24, 24)} and {square.mode for square in squares} == {"RGBA"}


@examples(60)
@given(name=NAMES)
def test_any_file_name_is_written_whole_under_this_name_or_refused(name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in" / name
        try:
            images.write_png(path, np.zeros((2, 2, 3), np.uint8))
        except D2Error as error:
            assert error.exit_code == 5 and str(error).isprintable()
            assert not path.parent.exists() or path.is_dir() or list(path.parent.iterdir()) == []
            return
        assert [found.name for found in path.parent.iterdir()] == [name]
        assert images.read_rgba(path)[0].shape == (2, 2, 4)
        assert fileio.quoted(path).isprintable()
