"""Run folders in the way of `reconstruct`; crashes, stops, resumes and failing disks: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from faults.assertions import expect_fault
from faults.tiny import TINY, StopAfter, tiny_reconstruct

from d2 import camera, fileio, images
from d2.errors import Stopped
from d2.recon import pipeline
from d2.run import Run, cell_path


@pytest.fixture
def finished_matrix(tmp_path) -> Run:
    """A run folder whose generate stage is committed: 4 views × 2 frames."""
    run = Run.create(tmp_path / "run")
    rig = camera.orbit(4, width=16, height=16)
    run.write_matrix(lambda v, f: np.pad(np.full((8, 8, 4), 200, np.uint8), ((4, 4), (4, 4), (0, 0))), 2, rig, {})
    return run


@pytest.fixture
def stopped(tiny_dataset, tmp_path) -> Path:
    """A run folder in which a reconstruction stopped at iteration 5 of 6, with two checkpoints."""
    with pytest.raises(Stopped):
        tiny_reconstruct(tiny_dataset, tmp_path / "out", should_stop=StopAfter(5))
    return tmp_path / "out"


# -- the run folder ----------------------------------------------------------------------------------------


@pytest.mark.row(30)
def test_row_30_a_finished_reconstruction_is_kept_and_overwrite_replaces_it(tiny_dataset, tmp_path):
    first = tiny_reconstruct(tiny_dataset, tmp_path / "o")
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 8, "--overwrite", folder=tmp_path)
    old = first.model.read_bytes()
    second = tiny_reconstruct(tiny_dataset, tmp_path / "o", "seed=3", overwrite=True)
    assert second.model.read_bytes() != old
    assert [path.name for path in (tmp_path / "o" / "recon").iterdir()] == ["main"]


@pytest.mark.row(30)
def test_row_30_a_replacement_that_fails_leaves_the_old_one(tiny_dataset, tmp_path):
    tiny_reconstruct(tiny_dataset, tmp_path / "o")
    again = {"overwrite": True, "should_stop": StopAfter(3)}
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o", **again), 143, "--overwrite", folder=tmp_path)
    assert Run.open(tmp_path / "o").stage("reconstruct:main") is not None
    # With other settings the given-up replacement is started anew; the swap leaves one folder.
    tiny_reconstruct(tiny_dataset, tmp_path / "o", "seed=4", overwrite=True)
    assert [path.name for path in (tmp_path / "o" / "recon").iterdir()] == ["main"]


@pytest.mark.row(30)
def test_a_process_that_dies_within_the_swap_loses_nothing(tiny_dataset, tmp_path, monkeypatch):
    old = tiny_reconstruct(tiny_dataset, tmp_path / "o").model.read_bytes()
    real = os.replace

    def die(source, target):
        if Path(source).name == ".main.new":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(fileio.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        tiny_reconstruct(tiny_dataset, tmp_path / "o", "seed=5", overwrite=True)
    monkeypatch.undo()
    # The same command finishes from the checkpoints of the old model, which is there again.
    assert tiny_reconstruct(tiny_dataset, tmp_path / "o").model.read_bytes() == old


def test_a_process_that_dies_before_its_commit_is_resumed(tiny_dataset, tmp_path, monkeypatch):
    whole = tiny_reconstruct(tiny_dataset, tmp_path / "whole").model.read_bytes()

    def die(self, name, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit_stage", die)
    with pytest.raises(KeyboardInterrupt):
        tiny_reconstruct(tiny_dataset, tmp_path / "o")
    monkeypatch.undo()
    assert tiny_reconstruct(tiny_dataset, tmp_path / "o").model.read_bytes() == whole


@pytest.mark.row(31)
def test_row_31_an_output_that_is_a_file_or_below_one_is_refused_before_work(tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        expect_fault(lambda out=out: tiny_reconstruct(tiny_dataset, out), 3, "is a file", folder=tmp_path)


@pytest.mark.row(31)
def test_row_31_a_read_only_output_is_refused_before_work(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(fileio.os, "access", lambda path, mode: False)  # root may write everywhere
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 3, "permission denied", folder=tmp_path)


@pytest.mark.row(31)
def test_row_31_a_missing_parent_is_created_and_the_users_dataset_is_never_written_to(tiny_dataset, tmp_path):
    before = sorted(tiny_dataset.rglob("*"))
    assert tiny_reconstruct(tiny_dataset, tmp_path / "a" / "b").model.is_file()
    assert sorted(tiny_dataset.rglob("*")) == before
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tiny_dataset), 8, "not empty", folder=tiny_dataset)


@pytest.mark.row(32)
def test_row_32_a_second_process_on_the_same_run_is_told_who_holds_it(tiny_dataset, tmp_path):
    run = Run.create(tmp_path / "o")
    with run.lock():
        expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 8, f"locked by pid {os.getpid()}")


@pytest.mark.row(33)
def test_row_33_a_damaged_manifest_is_one_line(tiny_dataset, tmp_path):
    (tmp_path / "o").mkdir()
    for text in ("", "[]", '{"version": 99, "stages": {}}', '{"stages": NaN}'):
        (tmp_path / "o" / "run.json").write_text(text)
        expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 3, "o", folder=tmp_path)


@pytest.mark.row(35)
def test_row_35_an_image_of_a_run_that_is_gone_or_changed_is_named(finished_matrix, tmp_path):
    path = finished_matrix.folder / cell_path(2, 1)
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    expect_fault(lambda: tiny_reconstruct(finished_matrix.folder, tmp_path / "o"), 3, "v02/f001.png", "sha256")
    path.unlink()
    expect_fault(lambda: tiny_reconstruct(finished_matrix.folder, tmp_path / "o"), 3, "v02/f001.png", "missing")


@pytest.mark.row(36)
@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_row_36_an_unfinished_run_is_a_conflict_that_says_how_to_go_on(tmp_path, out):
    run = Run.create(tmp_path / "run")
    place = tmp_path / out if out else None
    expect_fault(lambda: tiny_reconstruct(run.folder, place), 8, "d2 generate --resume", folder=tmp_path)


# -- crash, resume, disk -----------------------------------------------------------------------------------


@pytest.mark.row(41)
def test_row_41_a_stopped_run_goes_on_bit_for_bit(tiny_dataset, tmp_path):
    whole = tiny_reconstruct(tiny_dataset, tmp_path / "whole")
    for steps in (1, 2):
        expect_fault(
            lambda n=steps: tiny_reconstruct(tiny_dataset, tmp_path / "o", should_stop=StopAfter(n)), 143, "go on"
        )
    resumed = tiny_reconstruct(tiny_dataset, tmp_path / "o")
    for name in (pipeline.MODEL, "metrics.jsonl", "config.yaml"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_the_resume_command_repeats_every_choice_in_shell_quotes(tiny_dataset, tmp_path):
    options = {"name": "b", "preset": "fast", "should_stop": StopAfter(1)}
    odd = tmp_path / "my run"
    message = expect_fault(lambda: tiny_reconstruct(tiny_dataset, odd, "lr_sh=1e-3", **options), 143)
    command = message.partition("go on with: ")[2]
    sets = " ".join(f"--set {text}" for text in (*TINY, "lr_sh=1e-3"))
    assert command == f"d2 reconstruct {tiny_dataset} --out '{odd}' --name b --preset fast --device cpu {sets}"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.row(44)
def test_row_44_too_little_disk_stops_before_any_work(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(fileio.shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 20))
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o"), 5, "1 MB free", folder=tmp_path)
    assert not (tmp_path / "o").exists()


@pytest.mark.row(45)
def test_row_45_another_configuration_is_not_resumed(tiny_dataset, stopped):
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, stopped, "seed=9"), 8, "seed: 0 -> 9", folder=stopped)


@pytest.mark.row(45)
def test_row_45_other_images_are_not_resumed(tiny_dataset, stopped):
    images.write_png(tiny_dataset / "train" / "v00_f000.png", np.full((32, 32, 4), 255, np.uint8))
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, stopped), 8, "other images", folder=stopped)


@pytest.mark.row(46)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "header"])
def test_row_46_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_dataset, stopped, tmp_path, damage):
    newest = sorted((stopped / "recon" / "main" / "ckpt").iterdir())[-1]
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[-50] ^= 1
    newest.write_bytes({"flip": data, "truncate": data[:-9], "empty": b"", "header": b"\xff" * 8 + data[8:]}[damage])
    told = pipeline.Observer()
    messages = []
    told.message = messages.append  # type: ignore[method-assign]
    resumed = tiny_reconstruct(tiny_dataset, stopped, observer=told)
    assert any(newest.name in m and m.startswith("Warning: ") for m in messages)
    assert any("Resuming at iteration 4" in m for m in messages)
    assert resumed.model.read_bytes() == tiny_reconstruct(tiny_dataset, tmp_path / "whole").model.read_bytes()


@pytest.mark.row(46)
def test_row_46_good_checkpoints_are_never_pushed_out_by_damaged_later_ones(tiny_dataset, stopped):
    folder = stopped / "recon" / "main" / "ckpt"
    for name in ("step_00000098.safetensors", "step_00000099.safetensors"):
        (folder / name).write_bytes(b"")
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, stopped, should_stop=StopAfter(1)), 143)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005.safetensors", "step_00000006.safetensors"]


@pytest.mark.row(47)
def test_row_47_the_newest_checkpoint_is_the_one_of_the_highest_step(tiny_dataset, stopped):
    first, last = sorted((stopped / "recon" / "main" / "ckpt").iterdir())
    os.utime(first, (2e9, 2e9))
    os.utime(last, (0, 0))
    messages = []
    told = pipeline.Observer()
    told.message = messages.append  # type: ignore[method-assign]
    tiny_reconstruct(tiny_dataset, stopped, observer=told)
    assert "Resuming at iteration 5" in messages


@pytest.mark.row(48)
@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EIO])
def test_row_48_a_disk_that_fails_is_one_line_and_old_files_stay(tiny_dataset, stopped, monkeypatch, name, code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fileio.os, name, fail)
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, stopped), 5, "cannot write", folder=stopped)


@pytest.mark.row(51)
@pytest.mark.parametrize("setting", ["lr_scales=1e30", "lr_opacities=1e38", "lr_sh=1e38", "lr_quats=1e38"])
def test_row_51_numbers_that_leave_the_finite_are_announced_and_logs_stay_valid(tiny_dataset, tmp_path, setting):
    expect_fault(lambda: tiny_reconstruct(tiny_dataset, tmp_path / "o", setting, "iterations=40"), 6)
    log = tmp_path / "o" / "recon" / "main" / "metrics.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def test_a_deleted_result_is_made_again(tiny_dataset, tmp_path):
    first = tiny_reconstruct(tiny_dataset, tmp_path / "o")
    data = first.model.read_bytes()
    shutil.rmtree(first.folder)
    assert tiny_reconstruct(tiny_dataset, tmp_path / "o").model.read_bytes() == data
