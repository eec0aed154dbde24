"""Small slices of the campaigns: interruptions and damaged files of every kind. make campaign runs them in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from surroundings import ROOT, cli_environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz
import hygiene


def campaign(name, *words):
    call = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, words)]
    return subprocess.run(call, env=cli_environment() | BLAS, capture_output=True, text=True)


BLAS = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_interrupted_anywhere_a_reconstruction_ends_in_the_same_bits(tmp_path):
    words = ["--stage", "reconstruct", "--kills", 2, "--every", 13, "--out", tmp_path / "record.json"]
    done = campaign("crash", *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())["stages"]["reconstruct"]
    for kind in ("kills", "deaths", "write_failures"):
        assert record[kind]["tried"] == record[kind]["survived"] > 0
    assert record["resumes"]["tried"] == record["resumes"]["bit_equal"] > 20


@pytest.mark.parametrize("target", ["ply", "splat", "spz", "run", "transforms", "yaml", "safetensors", "html-payload"])
def test_damaged_files_raise_nothing_that_is_not_documented(tmp_path, target, capsys):
    if target == "html-payload" and not fuzz.shutil.which("node"):
        pytest.skip("no node, which runs the page's own reader")
    record = fuzz.fuzz(target, tmp_path, n=300, seconds=0, seed=0)
    assert record["mutations"] == 300 and record["undocumented"] == 0, capsys.readouterr().err
    assert record["read"] > 0 and record["refused"] > 0


def test_a_reader_that_lets_something_out_is_noticed(tmp_path, monkeypatch, capsys):
    def careless(path):
        return path.read_bytes()[40]

    target = fuzz.Target([bytes(range(64))], ".x", careless)
    monkeypatch.setattr(fuzz, "targets", lambda place: {"careless": target})
    assert fuzz.fuzz("careless", tmp_path, n=50, seconds=0, seed=0)["undocumented"] > 0
    assert "IndexError" in capsys.readouterr().err


def test_mutations_are_a_function_of_their_number():
    target = fuzz.Target([bytes(range(64))], ".x", len)
    assert fuzz.mutated(target, "a", 1, 7) == fuzz.mutated(target, "a", 1, 7) != fuzz.mutated(target, "a", 1, 8)


def test_a_long_reconstruction_takes_no_more_memory_files_and_threads(tmp_path):
    assert hygiene.grown(hygiene.many_iterations(tmp_path, 200))["flat"]


def test_what_grows_is_noticed(tmp_path):
    opened = []
    looks = [hygiene.look()]
    for k in range(4):
        opened.append(os.open(tmp_path / str(k), os.O_CREAT))
        looks.append(hygiene.look())
    for descriptor in opened:
        os.close(descriptor)
    assert not hygiene.grown(looks)["flat"]
