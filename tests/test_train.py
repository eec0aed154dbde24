"""Training of a small pair: it learns, resumes bit for bit, and what it writes is what `d2 generate` loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_pair import single_thread

import d2
from d2 import fileio, publish, sequences, toybox
from d2 import train as training
from d2.errors import InputError, NumericalError, SetupError, Stopped
from d2.models.patch import PatchConfig, PatchFirstStage, principal_components
from d2.models.weights import check
from d2.run import Run

SMALL = (
    "unet_channels=16", "unet_mult=[1, 1]", "unet_attention=[2]", "unet_head=8", "unet_groups=4", "embedding=8",
    "clip_size=16", "clip_patch=8", "clip_width=16", "clip_heads=2", "clip_output=8", "latent_channels=12",
    "vae_channels=8", "size=32", "views=4", "frames=3", "batch=2", "lr_warmup=2", "checkpoint_every=4",
)  # fmt: skip


def settings(*sets):
    return training.configure("tiny", (*SMALL, *sets))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with an autoencoder of the small configuration."""
    folder = tmp_path_factory.mktemp("vae")
    c = settings()
    publish.train_vae(c, sequences.Toys(c, "train"), folder, steps=6)
    return folder


@pytest.fixture
def folder(vae, tmp_path):
    fileio.atomic_write(tmp_path / publish.VAE_NAME, (vae / publish.VAE_NAME).read_bytes())
    return tmp_path


def run(model, folder, *sets, **options):
    c = settings(*sets)
    data, held_out = sequences.Toys(c, "train"), sequences.Toys(c, "validation")
    with single_thread():
        return training.train(model, c, data, held_out, folder, **options)


@pytest.mark.parametrize("model", ["view", "frame"])
def test_a_training_writes_a_checkpoint_that_the_strict_loader_takes(folder, model):
    path = run(model, folder, "steps=4")
    header = check(path, settings().spec(model))
    assert {entry.dtype for stored in header.values() for entry in stored.entries} == {torch.float16}
    scores = json.loads((folder / f"train_{model}.jsonl").read_text().splitlines()[-1])
    assert scores["step"] == 4
    assert all(np.isfinite(scores[f"psnr@{sigma:g}"]) for sigma in training.EVALUATION_SIGMAS)


def test_a_trained_pair_generates_through_the_same_path_as_the_official_one(folder, tmp_path):
    """Same Pair, sampler, run folder and resume: only the preset differs."""
    for model in ("view", "frame"):
        run(model, folder, "steps=2")
    toy = toybox.write_dataset(toybox.sample_toy("test", 0), tmp_path / "toy", 4, 3, 32)
    preset = tmp_path / "small.yaml"
    fields = {text.split("=")[0]: fileio.parse_yaml(text.split("=")[1], "") for text in SMALL}
    for name in ("batch", "lr_warmup", "checkpoint_every"):
        del fields[name]
    tiny = fileio.read_yaml(d2.config.preset_path("tiny", "generate"))
    fileio.write_yaml(preset, tiny | fields | {"steps": 3, "save_every": 1})
    asked = iter([0, 0, 0])
    options = {"preset": preset, "weights": folder, "device": "cpu"}
    source, out = toy.folder / "images/v03/f000.png", tmp_path / "run"
    with single_thread():
        with pytest.raises(Stopped):
            d2.generate(source, out, should_stop=lambda: next(asked, 15), **options)
        d2.generate(source, out, **options)
        whole = d2.generate(source, tmp_path / "whole", **options)
    matrix, twin = Run.open(out).matrix(), Run.open(whole.folder).matrix()
    assert matrix.views == 4
    assert matrix.frames == 3
    assert all(np.array_equal(matrix[v, f], twin[v, f]) for v in range(4) for f in range(3))


def test_learning_lowers_the_loss(folder):
    run("view", folder, "steps=4", "lr_decay=0")
    first = json.loads((folder / "train_view.jsonl").read_text().splitlines()[0])
    run("view", folder, "steps=60", "lr_decay=0", "checkpoint_every=60", "average=0.5")
    last = json.loads((folder / "train_view.jsonl").read_text().splitlines()[-1])
    assert last["psnr@10"] > first["psnr@10"] + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_training_goes_on_to_the_same_bits(folder, vae, tmp_path_factory, workers):
    whole = run("frame", folder, "steps=6", f"workers={workers}").read_bytes()
    other = tmp_path_factory.mktemp("stopped")
    fileio.atomic_write(other / publish.VAE_NAME, (vae / publish.VAE_NAME).read_bytes())
    asked = iter([0, 0])
    with pytest.raises(Stopped, match="step 3 of 6"):
        run("frame", other, "steps=6", f"workers={workers}", should_stop=lambda: next(asked, 15))
    assert run("frame", other, "steps=6", f"workers={workers}").read_bytes() == whole


def test_a_longer_training_continues_a_shorter_one(folder):
    run("view", folder, "steps=3")
    run("view", folder, "steps=5")
    steps = [json.loads(line)["step"] for line in (folder / "train_view.jsonl").read_text().splitlines()]
    assert steps == [3, 4, 5]


def test_a_state_of_other_networks_is_refused(folder):
    run("view", folder, "steps=2")
    with pytest.raises(InputError, match="not a training of these networks"):
        run("view", folder, "steps=4", "unet_channels=24", "unet_head=12")


def test_without_the_autoencoder_the_command_to_train_it_is_named(tmp_path):
    with pytest.raises(SetupError, match="d2 train vae"):
        run("view", tmp_path, "steps=2")


def test_a_diverged_training_says_so_and_keeps_its_last_state(folder, monkeypatch):
    run("view", folder, "steps=4")
    monkeypatch.setattr(training, "_loss", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(NumericalError, match="step 4; lower lr"):
        run("view", folder, "steps=6")
    monkeypatch.undo()
    assert run("view", folder, "steps=6").is_file()


def test_only_a_preset_with_a_patch_autoencoder_can_be_trained():
    c = training.configure("fast")
    with pytest.raises(InputError, match="autoencoder: patch"):
        publish.train_vae(c, sequences.Toys(c, "train"), None, 1)  # type: ignore[arg-type]


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    c = settings("steps=100", "lr_warmup=10", "lr_decay=0.5")
    rates = [training.learning_rate(step, c) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_principal_components_keep_more_than_any_other_directions():
    c = settings()
    pictures = sequences.Toys(c, "train").batch("view", (0,), 8).pictures.flatten(0, 1)
    config = PatchConfig(4, 12)
    module = PatchFirstStage(config)
    errors = []
    for basis, gain in (principal_components(pictures, config), (torch.linalg.qr(torch.randn(48, 12))[0].T, 1.0)):
        module.set_basis(basis.reshape(12, 3, 4, 4), gain)
        with torch.no_grad():
            latents = module.encode(pictures, torch.empty(0))
            errors.append((module.decode(latents) - pictures).square().mean())
        if gain != 1.0:
            assert latents.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert errors[0] < 0.3 * errors[1]


def test_white_is_latent_zero_and_zero_is_drawn_white():
    module = PatchFirstStage(PatchConfig(4, 12, 8, 1, 4))
    torch.nn.init.zeros_(module.decoder.conv_out.weight)
    torch.nn.init.zeros_(module.decoder.conv_out.bias)
    with torch.no_grad():
        latent = module.encode(torch.ones(1, 3, 16, 16), torch.empty(0))
        assert latent.abs().max() == 0
        assert (module.decode(latent) == 1).all()


def test_columns_end_and_rows_begin_with_the_reference():
    c = settings()
    toys = sequences.Toys(c, "train")
    for model, place in (("view", -1), ("frame", 0)):
        batch = toys.batch(model, (3,), 2)
        assert batch.pictures.shape == (2, 4 if model == "view" else 3, 3, 32, 32)
        assert torch.equal(batch.reference(model), batch.pictures[:, place])
        assert torch.equal(batch.pictures, toys.batch(model, (3,), 2).pictures)
        assert not torch.equal(batch.pictures, toys.batch(model, (4,), 2).pictures)


def test_a_users_runs_are_data_too(tmp_path, folder):
    c = settings()
    for index in range(2):
        toybox.write_dataset(toybox.sample_toy("train", index), tmp_path / f"runs/{index}", 4, 3, 32)
    data = sequences.Runs(c, tmp_path / "runs")
    column = data.batch("view", (0,), 3)
    assert column.pictures.shape == (3, 4, 3, 32, 32)
    assert column.pictures.max() == 1
    toys = sequences.Toys(settings("elevation_deg=10"), "train")
    assert column.vector.shape == toys.batch("view", (0,), 3).vector.shape
    with single_thread():
        assert training.train("view", settings("steps=2"), data, data, folder).is_file()
    with pytest.raises(InputError, match="expected"):
        sequences.Runs(settings("frames=5"), tmp_path / "runs")
    with pytest.raises(InputError, match="holds no run"):
        sequences.Runs(c, folder / "nothing")


def test_the_command_trains_and_says_where_the_model_is(run_cli, folder):
    sets = [part for text in SMALL for part in ("--set", text)]
    done = run_cli("train", "frame", "--out", folder, "--steps", "2", "--threads", "1", *sets)
    assert done.code == 0
    assert "tiny_frame.safetensors: trained" in done.stdout
    assert "train frame: 2 of 2" in done.stderr
