"""The composition benchmark: what its measures and controls mean, on a pair of random weights."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pair import single_thread

from d2 import fileio
from d2.recon import composition
from d2.run import Run

SETS = ("views=4", "frames=3", "steps=2", "size=32")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny):
    """One toy through the main variants, with the folder of its samples."""
    work = tmp_path_factory.mktemp("composition")
    settings = composition.configuration.load(composition.GenerateConfig, tiny / "preset.yaml", sets=SETS)
    task = composition.Task(0, "image", composition.MAIN, False)
    with single_thread():
        return composition.measure(task, settings, tiny / "preset.yaml", tiny, SETS, work), work, settings


def cells(work, variant):
    return Run.open(work / "toy000" / f"image-{variant}").matrix().tensor([0, 1, 2, 3], [0, 1, 2])


def test_all_samples_share_the_references(measured):
    _, work, _ = measured
    for which in ("reference_video", "reference_views"):
        digests = {
            tuple(fileio.sha256(path) for path in sorted((work / f"toy000/image-{v}/generate/{which}").iterdir()))
            for v in ("composed", "view-only", "frame-only")
        }
        assert len(digests) == 1


def test_the_composed_sample_differs_from_both_models_alone(measured):
    _, work, _ = measured
    composed, view, frame = (cells(work, v) for v in ("composed", "view-only", "frame-only"))
    assert (composed - view).abs().max() > 0.01
    assert (composed - frame).abs().max() > 0.01


def test_the_average_is_the_average(measured):
    items, work, settings = measured
    truth = composition._truth(0, settings, work / "toy000")
    average = (cells(work, "view-only") + cells(work, "frame-only")) / 2
    found = next(item["scores"] for item in items if item["variant"] == "average")
    assert found["psnr"] == pytest.approx(composition.scores_of(average, truth)["psnr"])
    assert {item["variant"] for item in items} == {*composition.MAIN, "average", "static references"}


def test_the_truth_scores_perfectly_and_only_free_cells_count(measured):
    _, work, settings = measured
    truth = composition._truth(0, settings, work / "toy000")
    sample = truth[:, :, :3].clone()
    sample[-1], sample[:, 0] = 0.5, 0.5
    scores = composition.scores_of(sample, truth)
    assert scores["psnr"] == 100
    assert scores["ssim"] == pytest.approx(1, abs=1e-5)
    perfect = composition.scores_of(truth[:, :, :3], truth)
    assert perfect["flicker"] < 0.01
    assert perfect["motion"] == pytest.approx(1)
    assert composition.scores_of(truth[:, :1, :3].expand(-1, 3, -1, -1, -1), truth)["motion"] == 0


def test_a_table_has_means_intervals_and_paired_differences():
    items = [
        {"toy": toy, "mode": "image", "variant": variant, "scores": {"psnr": 20.0 + toy + shift}}
        for toy in range(3)
        for variant, shift in (("composed", 0.0), ("average", -0.5))
    ]
    composed, average = composition.table(items)
    assert composed["psnr"] == [21.0, pytest.approx(1.96 / 3**0.5, abs=1e-4)]
    assert average["composed minus this: psnr"] == [0.5, 0.0]
    assert "image" in composition.as_text({"toys": 3, "steps": 2, "machine": "m", "rows": [composed, average]})


def test_a_repeated_call_goes_on_where_the_last_one_stopped(tiny, tmp_path, monkeypatch):
    asked = []

    def fake(task, *rest):
        asked.append((task.toy, task.mode))
        if len(asked) == 3:
            raise RuntimeError("killed")
        return [{"toy": task.toy, "mode": task.mode, "variant": "composed", "scores": {"psnr": 1.0}}]

    monkeypatch.setattr(composition, "measure", fake)
    call = {"toys": 2, "few": 1, "preset": tiny / "preset.yaml", "weights": tiny, "work": tmp_path}
    with pytest.raises(RuntimeError):
        composition.composition(**call)
    rows = composition.composition(**call)["rows"]
    assert len(asked) == len(set(asked)) + 1
    assert {row["mode"] for row in rows} == set(composition.MODES)
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 6


def test_the_command_prints_the_table(run_cli, tiny, tmp_path, monkeypatch):
    line = {"toy": 0, "variant": "composed", "scores": {"psnr": 21.5}}
    settings = composition.configuration.load(composition.GenerateConfig, tiny / "preset.yaml")
    digests = composition.load_models(settings, tiny).digests()
    key = composition.configuration.digest(settings) + str(sorted(digests.values()))
    for mode in composition.MODES:
        fileio.append_line(tmp_path / "items.jsonl", json.dumps(line | {"mode": mode, "key": key}))
    done = run_cli(
        "bench", "composition", "--toys", "1", "--few", "1", "--preset", tiny / "preset.yaml", "--weights", tiny,
        "--work", tmp_path,
    )  # fmt: skip
    assert done.code == 0
    assert "21.500 ± 0.000" in done.stdout


def test_single_values_have_no_spread():
    assert composition.interval([2.0]) == [2.0, 0.0]
    assert torch.tensor(composition.interval([1.0, 3.0])).tolist() == pytest.approx([2.0, 1.96])


def test_a_consistent_matrix_leaves_a_smaller_residual_than_one_whose_cells_disagree(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(composition, "FIT_SETS", ("holdout=0", "iterations=120", "start_gaussians=500"))
    _, work, settings = measured
    truth = composition._truth(0, settings, work / "toy000")[:, :, :3]
    shuffled = truth.roll(1, 0) * torch.tensor([1, 0.6, 1])[None, :, None, None, None]
    scores = [
        composition.fit_residual(composition.write_run(sample, tmp_path / name, settings))
        for name, sample in (("true", truth), ("shuffled", shuffled))
    ]
    assert scores[0] > scores[1] + 1
