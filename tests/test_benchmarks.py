"""The scripts behind our claims run, and their records hold what the claims are read from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_quick_rasterizer_benchmark_records_times_and_agrees_with_the_prototype(tmp_path):
    out = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "rasterize.py", "--quick", "--out", out], capture_output=True, text=True
    )
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
    return subprocess.run([sys.executable, "-c", script, *words], cwd=BENCHMARKS, capture_output=True, text=True)


def test_agreement_of_rasterizers_is_told_for_the_picture_and_every_gradient():
    done = agreement(1e-4)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 11 and all(line["ok"] for line in lines), done.stderr


def test_a_disagreement_of_rasterizers_ends_with_1():
    assert agreement(1e-12).returncode == 1
