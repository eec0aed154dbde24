"""Small slices of the campaigns: interruptions and damaged files of every kind. make campaign runs them in full."""

from __future__ import annotations

import errno
import os
import random
import sys

import pytest
from surroundings import ROOT

from d2 import fileio

sys.path.insert(0, str(ROOT / "benchmarks"))
import crash
import fuzz
import hygiene
import stages


def test_interrupted_anywhere_a_reconstruction_ends_in_the_same_bits(tmp_path, one_thread):
    sweep = crash.Sweep(stages.Reconstruct(tmp_path), tmp_path, random.Random(0), forks=False)
    sweep.deaths(every=60)
    sweep.failing_writes(every=90, codes=(errno.EIO,))
    assert sweep.lost == [] and sweep.changes > 50
    for kind in ("deaths", "write_failures"):
        assert sweep.record[kind]["tried"] == sweep.record[kind]["survived"] > 0
    assert sweep.record["resumes"]["tried"] == sweep.record["resumes"]["bit_equal"] > 2


def test_work_that_is_lost_is_noticed(tmp_path):
    class Careless(stages.Stage):
        """Writes a file twice, and takes its being there for its being done."""

        def prepare(self):
            pass

        def work(self, out, should_stop=None, processes=1):
            if not (out / "a.json").exists():
                fileio.write_json(out / "a.json", [])
                fileio.write_json(out / "a.json", [1])

        def done(self, out):
            return False

        def result(self, out):
            return stages.digests(out, "*")

    sweep = crash.Sweep(Careless(tmp_path), tmp_path, random.Random(0), forks=False)
    sweep.deaths(every=1)
    assert any("these differ: a.json" in text for text in sweep.lost)


@pytest.mark.parametrize(
    "target",
    [
        "ply", "splat", "spz", "glb", "run", "transforms", "yaml", "safetensors", "image", "colmap", "cameras",
        "html-payload",
    ],
)  # fmt: skip
def test_damaged_files_raise_nothing_that_is_not_documented(tmp_path, target, capsys):
    if target == "html-payload" and not fuzz.shutil.which("node"):
        pytest.skip("no node, which runs the page's own reader")
    record = fuzz.fuzz(target, tmp_path, n=150, seconds=0, seed=0)
    assert record["mutations"] == 150 and record["undocumented"] == 0, capsys.readouterr().err
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
    assert hygiene.grown(hygiene.many_iterations(tmp_path, 60))["flat"]


def test_what_grows_is_noticed(tmp_path):
    opened = []
    looks = [hygiene.look()]
    for k in range(4):
        opened.append(os.open(tmp_path / str(k), os.O_CREAT))
        looks.append(hygiene.look())
    for descriptor in opened:
        os.close(descriptor)
    assert not hygiene.grown(looks)["flat"]
