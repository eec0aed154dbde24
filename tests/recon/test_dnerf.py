"""`d2 bench dnerf`: the protocol's size, splits and background, a row for each scene."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from faults.assertions import expect_fault

from d2.recon import benchmark, dnerf


@pytest.fixture
def scenes(tiny_dataset, tmp_path, monkeypatch) -> Path:
    """Two scenes of three splits, small ones: 32² halved to 16²."""
    monkeypatch.setattr(dnerf, "STORED", 32)
    monkeypatch.setattr(dnerf, "SIZE", 16)
    for name in ("bouncingballs", "trex"):
        folder = Path(shutil.copytree(tiny_dataset, tmp_path / "data" / name))
        shutil.copy(folder / "transforms_test.json", folder / "transforms_val.json")
    return tmp_path / "data"


def test_every_scene_is_fitted_to_train_and_measured_on_test_at_half_size(scenes, monkeypatch):
    asked = []

    def fit(path, size, seconds, preset, sets, device, out, observer):
        asked.append((path.name, size, seconds, preset))
        value = 30.0 + len(asked)
        return dict.fromkeys(("psnr", "psnr_worst", "psnr_foreground"), value) | {
            "ssim": 0.9, "seconds": seconds, "gaussians": 10,
        }  # fmt: skip

    monkeypatch.setattr(benchmark, "reconstruct", fit)
    result = dnerf.measure(scenes, 5.0, "fast")
    assert asked == [("bouncingballs", 16, 5.0, "fast"), ("trex", 16, 5.0, "fast")]
    assert result["mean"]["psnr"] == 31.5 and list(result["scenes"]) == ["bouncingballs", "trex"]
    lines = dnerf.as_text(result).splitlines()
    assert [line.split()[0] for line in lines] == ["psnr", "bouncingballs", "trex", "mean"] and "31.500" in lines[-1]


def test_a_real_scene_gives_a_row_of_the_whole_record(scenes):
    sets = ("start_gaussians=60", "max_gaussians=80", "holdout=0")
    row = dnerf.measure(scenes / "trex", 0.2, "fast", sets, "cpu")["scenes"]["trex"]
    assert row["size"] == 16 and row["test_images"] == 3 and row["psnr"] > 5 and row["machine"]["cores"] >= 1


def test_what_is_not_the_protocols_data_is_one_line_before_any_fit(scenes, monkeypatch):
    expect_fault(lambda: dnerf.measure(scenes / "none"), 3, "none")
    expect_fault(lambda: dnerf.measure(scenes / "trex" / "train"), 3, "no scene")
    (scenes / "trex" / "transforms_val.json").unlink()
    expect_fault(lambda: dnerf.measure(scenes), 3, "trex", "transforms_val.json is missing")
    monkeypatch.setattr(dnerf, "STORED", 800)
    expect_fault(lambda: dnerf.measure(scenes / "bouncingballs"), 3, "32×32, expected 800×800")
    meta = json.loads((scenes / "trex" / "transforms_train.json").read_text())
    assert meta["frames"], "the data themselves are untouched"
