"""The scripts behind our claims run, and their records hold what the claims are read from."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

from surroundings import cli_environment

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_quick_rasterizer_benchmark_records_times_and_agrees_with_the_prototype(tmp_path):
    out = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "rasterize.py", "--quick", "--out", out],
        env=cli_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["machine"]["cores"] >= 1 and record["rivals"][0] == "ours"
    assert record["threads"]["kernels"] >= 1 and record["threads"]["torch"] >= 1
    scene, iteration = record["scenes"]["5k@128"], record["iterations"]["5k@128"]
    assert set(scene) == {"gaussians", "size", "difference", "threads"} and "1" in scene["threads"]
    for entry in scene["threads"].values():
        ours = entry["ms"]["ours"]
        assert {"forward", "backward", "total", "project", "sort", "bin_splats", "composite"} < set(ours)
        assert {"composite_backward", "project_backward", "around"} < set(ours)
        assert all(value > 0 for value in ours.values())
    assert set(iteration["ms"]) == {"forward", "loss", "backward", "adam", "densify", "total"}
    assert iteration["target_ms"] == 12
    if "prototype" in record["rivals"]:
        assert scene["difference"]["prototype"]["image"] < 2e-3
        assert set(scene["threads"]["1"]["ours_over"]["prototype"]) == {"forward", "backward", "total"}


def test_missing_opensplat_checkout_is_one_clear_line(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "rasterize.py", "--opensplat", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "holds no rasterizer/gsplat-cpu/gsplat_cpu.cpp" in done.stderr


def agreement(tolerance: float) -> subprocess.CompletedProcess:
    """benchmarks/agreement.py on the CPU, with another bound."""
    script = f"import agreement, typer; agreement.TOLERANCE = {tolerance}; typer.run(agreement.main)"
    words = ["--device", "cpu", "--count", "60", "--size", "24"]
    call = [sys.executable, "-c", script, *words]
    return subprocess.run(call, cwd=BENCHMARKS, env=cli_environment(), capture_output=True, text=True)


def test_agreement_of_rasterizers_is_told_for_the_picture_and_every_gradient():
    done = agreement(1e-4)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 11 and all(line["ok"] for line in lines), done.stderr


def test_a_disagreement_of_rasterizers_ends_with_1():
    assert agreement(1e-12).returncode == 1


def test_every_kind_of_case_of_the_full_size_benchmark_runs_small_and_a_repeated_call_measures_nothing_anew(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    full_size = importlib.import_module("full_size")
    kinds = ("full", "compile_graph", "step_cache_2", "low_vram_8_gb")
    monkeypatch.setattr(full_size, "CASES", {name: full_size.CASES[name] for name in kinds})
    counted = full_size.budget.Evaluation(flops=100, peak=1, weights=1, reusing=10, deep=8)
    monkeypatch.setattr(full_size, "evaluation", lambda *words: counted)
    words = ["--out", str(tmp_path / "record.json"), "--device", "cpu", "--size", "32", "--repeat", "1"]
    assert full_size.main(words) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    cases = record["cases"]
    assert list(cases) == [*kinds, full_size.AROUND] and cases["compile_graph"] == {"skipped": "needs a GPU"}
    assert all(cases[name]["peak_mb"] > 0 for name in cases if name != "compile_graph")
    assert cases[full_size.AROUND]["row_seconds"] > 0 < cases[full_size.AROUND]["reference_seconds"]
    assert set(record["speed_over_full"]) == {"full", "step_cache_2", "low_vram_8_gb"}
    assert cases["full"]["step_cache_mb"] == 0 < cases["step_cache_2"]["step_cache_mb"]
    monkeypatch.setattr(full_size, "measure", None)
    assert full_size.main(words) == 0
    assert "over full" in capsys.readouterr().out
