"""A run folder under any sequence of work, kills, failing disks and deleted files never says what is not so."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from faults.examples import examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from surroundings import ROOT

from d2 import fileio
from d2.errors import ConflictError, D2Error
from d2.recon import exports, pipeline
from d2.recon.formats import sequence
from d2.run import Run, is_run

sys.path.insert(0, str(ROOT / "benchmarks"))
import crash
import stages

STAGES = {"generate": "", "reconstruct:main": "recon/main/"}  # stage -> where its files lie
INTERRUPTIONS = st.one_of(st.none(), st.tuples(st.sampled_from(["kill", "disk"]), st.integers(1, 70)))


def interrupted(how: tuple[str, int] | None):
    """From the n-th change on disk on nothing happens any more, or the n-th fails."""
    if how is None:
        return crash.seam(None)
    kind, n = how
    return crash.seam(crash.dying(n) if kind == "kill" else crash.failing(n, errno.ENOSPC))


class RunFolder(RuleBasedStateMachine):
    """A matrix (written, not sampled), what is reconstructed from it, and what is exported."""

    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="d2-states-"))
        self.folder, self.exported = self.place / "run", self.place / "export"
        self.deleted: set[Path] = set()

    def teardown(self):
        shutil.rmtree(self.place)

    def attempt(self, work, how):
        """Does the work, with an interruption; what d2 announces and the kill are the only ends it may have."""
        before = {path: path.read_bytes() for path in self.place.rglob("*") if path.is_file()}
        try:
            with interrupted(how):
                work()
        except crash.Gone:
            crash.bury(self.folder)
        except ConflictError:
            assert {path: path.read_bytes() for path in before} == before, "a conflict changed files"
        except D2Error as error:
            assert error.exit_code in (3, 5), error
        self.deleted = {path for path in self.deleted if not path.exists()}

    @initialize()
    def begin(self):
        stages.matrix_run(self.folder)

    @rule(how=INTERRUPTIONS, green=st.integers(0, 255))
    def write_another_matrix(self, how, green):
        def work():
            run = Run.open(self.folder)
            with run.lock():
                stages.write_ball(run, green)

        self.attempt(work, how)

    @rule(how=INTERRUPTIONS, overwrite=st.booleans(), seed=st.integers(0, 1))
    def reconstruct(self, how, overwrite, seed):
        sets = (*stages.SETS, "iterations=3", f"seed={seed}")
        options = {"sets": sets, "device": "cpu", "overwrite": overwrite}
        self.attempt(lambda: pipeline.reconstruct(self.folder, **options), how)

    @rule(how=INTERRUPTIONS, overwrite=st.booleans(), frames=st.integers(1, 2))
    def export(self, how, overwrite, frames):
        options = {"frames": frames, "overwrite": overwrite}
        self.attempt(lambda: exports.export(self.folder, ["ply", "spz", "usd"], self.exported, **options), how)

    @rule(number=st.integers(0, 1000))
    def delete_a_file(self, number):
        files = sorted(path for path in self.place.rglob("*") if path.is_file())
        if files:
            files[number % len(files)].unlink()
            self.deleted.add(files[number % len(files)])

    @invariant()
    def what_stands_there_is_whole(self):
        for path in self.place.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(self.place).parts)
            if path.is_file() and not hidden and path.suffix in crash.READERS:
                crash.READERS[path.suffix](path)

    @invariant()
    def what_the_manifest_says_is_so(self):
        if not is_run(self.folder):
            return
        run = Run.open(self.folder)
        for stage, record in run.manifest["stages"].items():
            for name, digest in record["files"].items():
                path = self.folder / (STAGES[stage] + name)
                assert path in self.deleted or fileio.sha256(path) == digest, f"{stage}: {name}"

    @invariant()
    def a_sequence_that_is_there_is_complete(self):
        for manifest in self.exported.glob("*/frames.json"):
            for entry in fileio.read_json(manifest)["frames"]:
                path = manifest.parent / entry["file"]
                assert path.exists() or path in self.deleted, path


def test_no_sequence_of_work_and_accidents_makes_a_run_folder_lie():
    run_state_machine_as_test(RunFolder, settings=examples(8, steps=10))


def test_what_a_killed_export_left_goes_and_what_a_living_one_works_on_stays(tmp_path):
    for pid in (1, 1 << 30, os.getpid()):
        (tmp_path / f".ply.{pid}.new").mkdir()
    (tmp_path / ".ply.mine.new").mkdir()
    (tmp_path / ".ply.old").mkdir()
    sequence.write(lambda time: b"x", tmp_path / "other", "a", ".ply", [0.0], 24.0)
    assert len(list(tmp_path.iterdir())) == 6, "another folder's were touched"
    (tmp_path / ".ply.old").rmdir()
    sequence.write(lambda time: b"x", tmp_path / "ply", "a", ".ply", [0.0], 24.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ply.1.new", ".ply.mine.new", "other", "ply"]


def test_an_export_that_dies_is_made_whole_by_the_same_call_and_leaves_nothing_behind(tmp_path):
    stage = stages.Export(tmp_path)
    stage.prepare()
    stage.work(tmp_path / "whole")
    with interrupted(("kill", 60)), pytest.raises(crash.Gone):
        stage.work(tmp_path / "out")
    stage.work(tmp_path / "out")
    assert stage.result(tmp_path / "out") == stage.result(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out").rglob(".*")] == []
