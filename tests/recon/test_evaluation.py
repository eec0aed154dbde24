"""`d2 bench evaluate`: what it reports, from which pictures, what it says of what it cannot measure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from faults.assertions import expect_fault
from scenes import moving_ball
from test_perceptual import lpips_state

from d2 import fileio, images
from d2.errors import InputError
from d2.recon import benchmark, dataset, evaluation, perceptual
from d2.recon.config import ReconstructConfig
from d2.recon.gaussians import Gaussians4D


def ball(shift: float = 0.0) -> Gaussians4D:
    """The moving ball, beside its place."""
    model = moving_ball()
    model.means = model.means + torch.tensor([shift, 0, 0])
    return model


@pytest.fixture
def models(tmp_path):
    """The model that drew the pictures, and two that are off."""
    for k, shift in enumerate((0.0, 0.02, 0.04)):
        ball(shift).save(tmp_path / f"{k}/gaussians.safetensors")
    return [tmp_path / str(k) for k in range(3)]


def test_the_model_that_drew_the_pictures_scores_as_the_truth(models, run_folder):
    result = evaluation.evaluate(models[0], run_folder)
    (row,) = result["models"]
    assert result["split"] == result["over_time_on"] == "all" and result["pictures"] == 24
    assert row["psnr"] > 45 and row["psnr_foreground"] > 40 and row["ssim"] > 0.99 and row["ms_ssim"] > 0.99
    assert row["flicker"] < 0.01 and row["motion"] == pytest.approx(1, abs=0.02)
    assert [band["pictures"] for band in row["psnr_by_elevation"]] == [24]
    assert result["mean"]["psnr"] == pytest.approx(row["psnr"], abs=1e-4) and "std" not in result


def test_several_models_have_a_mean_and_the_deviation_of_a_sample(models, run_folder):
    result = evaluation.evaluate(models, run_folder)
    values = [row["psnr"] for row in result["models"]]
    assert values[0] > values[1] > values[2]
    assert result["mean"]["psnr"] == pytest.approx(np.mean(values), abs=1e-4)
    assert result["std"]["psnr"] == pytest.approx(np.std(values, ddof=1), abs=1e-4)


def test_what_cannot_be_measured_is_absent_with_a_reason(models, run_folder):
    result = evaluation.evaluate(models[0], run_folder)
    assert set(result["absent"]) == {"chamfer, f_score", "lpips", "clip_i", "fvd"}
    assert "--lpips-weights" in result["absent"]["lpips"]
    assert not {"lpips", "clip_i", "chamfer_percent"} & result["models"][0].keys()


def test_measures_over_time_take_the_training_split_where_the_test_split_is_no_matrix(models, tiny_dataset):
    truth = evaluation.read_truth(tiny_dataset)
    assert (truth.split, truth.matrix_split, truth.grid) == ("test", "train", (6, 4)) and len(truth.cells) == 3
    scattered = truth.matrix.subset(torch.randperm(24, generator=torch.Generator().manual_seed(0)))
    order, shape = evaluation.matrix_order(scattered)
    assert shape == (6, 4) and evaluation.matrix_order(scattered.subset(torch.arange(23))) is None
    ordered = scattered.subset(order)
    assert all(len(ordered.views[v * 4 : v * 4 + 4].unique()) == 1 for v in range(6))
    assert (ordered.times.view(6, 4).diff(dim=1) > 0).all()


def test_weights_and_points_add_their_rows(models, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "FEATURE_SIZE", 24)
    monkeypatch.setattr(perceptual.LPIPS, "forward", lambda self, x, y: (x - y).abs().mean((1, 2, 3)))
    fileio.write_tensors(tmp_path / "alex.safetensors", lpips_state())
    lines = ["ply", "format ascii 1.0", "element vertex 2", *(f"property float {a}" for a in "xyz"), "end_header"]
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "f0.ply").write_text("\n".join([*lines, "-0.3 0 0.1", "0 0.3 -0.3", ""]))
    weights = evaluation.Weights(lpips=tmp_path / "alex.safetensors")
    result = evaluation.evaluate(models[0], run_folder, points=tmp_path / "points", weights=weights)
    assert 0 < result["mean"]["lpips"] < 0.01 and result["mean"]["chamfer_percent"] < 30
    assert set(result["absent"]) == {"clip_i", "fvd"}


def test_points_that_are_none_are_refused(models, run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no PLY file"), ("absent", "does not exist")):
        with pytest.raises(InputError, match=message):
            evaluation.evaluate(models[0], run_folder, points=tmp_path / name)
    (tmp_path / "bad.ply").write_text("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n")
    with pytest.raises(InputError, match=r"bad\.ply holds no points: y, z missing"):
        evaluation.evaluate(models[0], run_folder, points=tmp_path / "bad.ply")


def test_a_model_is_drawn_as_it_was_trained(models, run_folder):
    plain = evaluation.evaluate(models[0], run_folder)["mean"]["psnr"]
    fileio.write_yaml(models[0] / "config.yaml", {"antialiased": True})
    assert evaluation.evaluate(models[0], run_folder)["mean"]["psnr"] < plain - 3


def test_the_benchmark_of_reconstruction_tells_psnr_by_elevation(run_folder):
    found = benchmark.measure(ball(), dataset.load(run_folder), ReconstructConfig())
    assert found["psnr_by_elevation"][0]["psnr"] == pytest.approx(found["psnr"], abs=1e-3)


def test_the_command_prints_a_table_and_writes_json_plots_and_the_worst_pictures(run_cli, models, run_folder, tmp_path):
    words = ("bench", "evaluate", *models[:2], "--truth", run_folder)
    done = run_cli(*words, "--out", tmp_path / "report")
    assert done.code == 0, done.stderr
    assert "PSNR, dB" in done.stdout and "±" in done.stdout and "without lpips: no weights" in done.stdout
    record = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(record["pictures_by_model"]) == 2 and len(record["pictures_by_model"][0]) == 24
    sheet = images.read_rgba(tmp_path / "report" / "worst.png")[0]
    assert sheet.shape[:2] == (3 * 24 + 16, 4 * 24)
    assert images.read_rgba(tmp_path / "report" / "plots.png")[0].std() > 5


def test_a_missing_run_or_dataset_is_one_line(models, run_folder, tmp_path):
    for model, truth in ((tmp_path / "void", run_folder), (models[0], tmp_path / "void")):
        expect_fault(lambda model=model, truth=truth: evaluation.evaluate(model, truth), 3, "void", "does not exist")
