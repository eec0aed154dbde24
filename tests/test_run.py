import json
import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest

from d2 import camera, fileio, run
from d2.errors import ConflictError, D2Error, InputError
from d2.run import Run


def picture(v: int, f: int) -> np.ndarray:
    return np.full((4, 6, 4), (v, f, 0, 255), np.uint8)


@pytest.fixture
def finished(tmp_path) -> Run:
    """A run of 2 views × 3 frames whose generate stage is committed."""
    made = Run.create(tmp_path / "run", fps=12)
    made.write_matrix(picture, 3, camera.orbit(2, width=6, height=4), {"seed": 3})
    return made


def write_lock(folder, **changes) -> None:
    owner = {"pid": os.getpid(), "started": run._started(os.getpid()), "host": socket.gethostname()}
    (folder / ".lock").write_text(json.dumps(owner | changes))


# -- stages ----------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_committed(finished):
    again = Run.open(finished.folder)
    assert again.fps == 12 and again.stage("generate")["seed"] == 3
    assert again.stage("reconstruct:main") is None
    np.testing.assert_array_equal(again.matrix()[1, 2], picture(1, 2))


def test_transforms_name_pose_time_view_and_frame_of_every_image(finished):
    meta = fileio.read_json(finished.folder / "transforms.json")
    assert meta["orientation_override"] == "none" and (meta["w"], meta["h"]) == (6, 4)
    assert [(e["view"], e["frame"], e["time"]) for e in meta["frames"]] == [
        (v, f, f / 2) for v in range(2) for f in range(3)
    ]
    assert all((finished.folder / e["file_path"]).is_file() for e in meta["frames"])
    np.testing.assert_allclose(meta["frames"][-1]["transform_matrix"], camera.orbit(2, width=6, height=4).c2w[1])


def test_a_stage_commits_images_then_cameras_then_manifest(tmp_path, monkeypatch):
    order, real = [], os.replace

    def record(source, target):
        order.append(os.path.relpath(target, tmp_path / "run"))
        real(source, target)

    made = Run.create(tmp_path / "run")
    monkeypatch.setattr(fileio.os, "replace", record)
    made.write_matrix(picture, 2, camera.orbit(1, width=6, height=4), {})
    assert order == ["images/v00/f000.png", "images/v00/f001.png", "transforms.json", "run.json"]


def test_writing_the_matrix_again_takes_the_old_commit_back_first(finished):
    def fail(v, f):
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError):
        finished.write_matrix(fail, 3, camera.orbit(2, width=6, height=4), {})
    assert Run.open(finished.folder).stage("generate") is None


def test_an_unfinished_run_has_no_matrix(tmp_path):
    with pytest.raises(ConflictError, match="no finished matrix"):
        Run.create(tmp_path / "run").matrix()


@pytest.mark.row(35)
def test_a_deleted_image_is_named_by_view_and_frame(finished):
    (finished.folder / run.cell_path(1, 0)).unlink()
    with pytest.raises(InputError, match="view 1 frame 0"):
        finished.matrix()
    with pytest.raises(InputError, match=r"v01/f000\.png is missing"):
        finished.require_intact("generate")


def test_an_image_in_a_folder_that_may_not_be_entered_is_not_called_missing(finished, monkeypatch):
    def refuse(*words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run.os.path, "isfile", lambda path: not str(path).endswith(".png"))
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)
    monkeypatch.setattr(fileio.hashlib, "file_digest", refuse)
    with pytest.raises(InputError, match=r"cannot read .*f000\.png: permission denied"):
        finished.require_intact("generate")


@pytest.mark.row(35)
def test_a_flipped_bit_in_an_image_is_noticed(finished):
    finished.require_intact("generate")
    path = finished.folder / run.cell_path(0, 2)
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"v00/f002\.png changed"):
        finished.require_intact("generate")


def test_create_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConflictError, match="not empty"):
        Run.create(tmp_path)


def test_create_passes_over_what_a_killed_process_left(tmp_path):
    (tmp_path / ".run.abc123.json").write_text("{")
    assert Run.create(tmp_path).stage("generate") is None


def test_create_refuses_a_file_in_its_place_or_above_it(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is a file"):
            Run.create(place)


def test_create_makes_missing_parents(tmp_path):
    assert Run.open(Run.create(tmp_path / "a" / "b").folder).fps == 24


def test_times_go_from_0_to_1():
    assert [run.frame_time(f, 5) for f in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert run.frame_time(0, 1) == 0


# -- manifests nobody should trust -------------------------------------------------------------------------


@pytest.mark.row(21)
@pytest.mark.parametrize("version", [99, 0, "1", None, True, [1]])
def test_another_version_says_which_d2_is_needed(finished, version):
    finished.manifest |= {"version": version, "d2": "9.9.9"}
    finished._commit()
    with pytest.raises(InputError, match=r"9\.9\.9.*use the d2 that wrote it"):
        Run.open(finished.folder)


@pytest.mark.row(33)
@pytest.mark.parametrize(
    "change",
    [
        {"stages": []}, {"stages": None}, {"stages": {"generate": 3}}, {"stages": {"generate": {}}}, {"fps": 0},
        {"fps": -1}, {"fps": "12"}, {"fps": True}, {"fps": 10**400}, {"fps": None},
        {"stages": {"generate": {"views": 10**9, "frames": 10**9}}},
        {"stages": {"generate": {"views": 1.5, "frames": 1}}},
        {"stages": {"generate": {"views": 400, "frames": 400}}},
        {"stages": {"x": {"files": {"../../etc/passwd": "0"}}}}, {"stages": {"x": {"files": {"/a": "0"}}}},
        {"stages": {"x": {"files": ["a"]}}}, {"stages": {"x": {"files": {"a": 3}}}},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_and_values_in_a_manifest_are_refused(finished, change):
    text = json.dumps(finished.manifest | change)
    (finished.folder / "run.json").write_text(text)
    with pytest.raises(InputError):
        Run.open(finished.folder)


@pytest.mark.row(33)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"version": NaN}', '{"a": 1, "a": 2}', "[" * 5000, "\xff"]
)
def test_a_manifest_that_is_no_object_is_refused(finished, text):
    (finished.folder / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        Run.open(finished.folder)


@pytest.mark.row(33)
def test_500_mutations_of_a_manifest_only_ever_give_an_input_error(finished):
    rng, path = random.Random(0), finished.folder / "run.json"
    original, refused = path.read_bytes(), 0
    pieces = [b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"x"', b"1" * 400, b"{" * 50, b"\xff", b"\0", b",", b'"']
    for _ in range(500):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            a = rng.randrange(len(data))
            data[a : a + rng.choice([0, 1, 4, 30])] = rng.choice([*pieces, bytes([rng.randrange(256)])])
        path.write_bytes(data)
        try:
            opened = Run.open(finished.folder)
            if opened.stage("generate") is not None:
                opened.matrix()
                opened.require_intact("generate")
        except InputError:
            refused += 1
    assert refused > 300


# -- the lock ----------------------------------------------------------------------------------------------


def test_a_lock_is_there_while_held_and_gone_afterwards(finished):
    with finished.lock():
        assert (finished.folder / ".lock").is_file()
    assert not (finished.folder / ".lock").exists()


def test_a_lock_is_released_when_the_work_fails(finished):
    with pytest.raises(ZeroDivisionError), finished.lock():
        raise ZeroDivisionError
    assert not (finished.folder / ".lock").exists()


@pytest.mark.row(32)
def test_a_second_lock_names_pid_and_host_of_the_first(finished):
    where = f"locked by pid {os.getpid()} on {socket.gethostname()}"
    with finished.lock(), pytest.raises(ConflictError, match=where), Run.open(finished.folder).lock():
        pass


@pytest.mark.row(32)
def test_the_lock_of_another_living_process_holds(finished):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write_lock(finished.folder, pid=other.pid, started=run._started(other.pid))
        with pytest.raises(ConflictError, match=f"pid {other.pid}"), finished.lock():
            pass
    finally:
        other.communicate(b"\n")
    with finished.lock():  # it died
        pass


def test_the_lock_of_another_machine_holds(finished):
    write_lock(finished.folder, pid=1, host="elsewhere")
    with pytest.raises(ConflictError, match="pid 1 on elsewhere"), finished.lock():
        pass


def test_a_dead_pid_that_a_new_process_was_given_is_told_apart(finished):
    """A container that restarts gives the same small numbers again."""
    write_lock(finished.folder, started="12")
    with finished.lock():
        pass


@pytest.mark.row(32)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": -1}', '{"pid": 1e9}', '{"pid": true}']
)
def test_a_lock_that_names_no_living_owner_is_taken_over(finished, text):
    owner = text.replace("}", f', "host": "{socket.gethostname()}"}}') if text.endswith("}") else text
    (finished.folder / ".lock").write_text(owner)
    with finished.lock():
        pass
    assert not (finished.folder / ".lock").exists()


def test_what_another_process_committed_before_the_lock_is_kept(finished):
    late = Run.open(finished.folder)
    with finished.lock():
        finished.commit_stage("reconstruct:a", {})
    with late.lock():
        late.commit_stage("reconstruct:b", {})
    assert {"generate", "reconstruct:a", "reconstruct:b"} == Run.open(finished.folder).manifest["stages"].keys()


def test_every_failure_of_a_run_is_announced_in_one_line(tmp_path):
    with pytest.raises(D2Error) as caught:
        Run.open(tmp_path / "line\nbreak")
    assert "\n" not in str(caught.value)
