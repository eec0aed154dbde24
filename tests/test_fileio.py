import errno
import json
import math
import os
import struct
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2 import fileio
from d2.errors import InputError, ResourceError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


# -- writing ---------------------------------------------------------------------------------------------


@pytest.mark.row(48)
@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EACCES, errno.EIO, errno.ENOSPC])
def test_a_failing_disk_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch, name, code):
    path = tmp_path / "a.json"
    fileio.atomic_write(path, b"old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fileio.os, name, fail)
    with pytest.raises(ResourceError, match=r"cannot write .*a\.json"):
        fileio.atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and files_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError, SystemExit])
def test_an_exception_in_the_encoder_keeps_the_old_file_and_leaves_no_temporary(tmp_path, error):
    path = tmp_path / "a.png"
    fileio.atomic_write(path, b"old")
    with pytest.raises(error), fileio.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and files_in(tmp_path) == ["a.png"]


def test_temporary_lies_in_the_same_folder_with_the_same_suffix(tmp_path):
    with fileio.atomic_path(tmp_path / "deep" / "a.mp4") as temporary:
        assert temporary.parent == tmp_path / "deep" and temporary.suffix == ".mp4"
    assert files_in(tmp_path / "deep") == ["a.mp4"]


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(fileio.os, "fsync", lambda fd: (events.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(fileio.os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    fileio.atomic_write(tmp_path / "a", b"x")
    assert events == ["sync", "rename", "sync"]


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        fileio.atomic_write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_syncs_nothing_is_no_fault(tmp_path, monkeypatch):
    """Some network file systems refuse to fsync a folder."""
    real = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "no")
        real(descriptor)

    monkeypatch.setattr(fileio.os, "fsync", refuse_folders)
    fileio.atomic_write(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_json_yaml_and_tensors_come_back_as_written(tmp_path):
    value = {"a": [1, 2.5, None, True, "ü\n"], "b": {"c": 1e-5}}
    fileio.write_json(tmp_path / "a.json", value)
    fileio.write_yaml(tmp_path / "a.yaml", value)
    assert fileio.read_json(tmp_path / "a.json") == fileio.read_yaml(tmp_path / "a.yaml") == value
    tensors = {"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.zeros(0, dtype=torch.int64)}
    fileio.write_tensors(tmp_path / "a.safetensors", tensors, {"k": "v"})
    back, metadata = fileio.read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"} and all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_nan_is_never_written_to_json(tmp_path):
    with pytest.raises(ValueError):
        fileio.write_json(tmp_path / "a.json", {"x": math.nan})
    assert files_in(tmp_path) == []


def test_exclusive_creation_succeeds_once_and_leaves_whole_content(tmp_path):
    path, wins = tmp_path / "lock", []
    threads = [
        threading.Thread(target=lambda k=k: wins.append(fileio.create_exclusive(path, b"%d" % k * 9))) for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 7 + [True]
    assert len(path.read_bytes()) == 9 and files_in(tmp_path) == ["lock"]


def test_swap_replaces_a_folder_and_removes_the_old_one(tmp_path):
    fileio.atomic_write(tmp_path / "final" / "a", b"old")
    fileio.atomic_write(tmp_path / "new" / "a", b"new")
    fileio.swap_folder(tmp_path / "new", tmp_path / "final")
    assert files_in(tmp_path) == ["final"] and (tmp_path / "final" / "a").read_bytes() == b"new"


def test_a_swap_that_dies_between_its_renames_is_undone(tmp_path, monkeypatch):
    fileio.atomic_write(tmp_path / "final" / "a", b"old")
    fileio.atomic_write(tmp_path / "new" / "a", b"new")
    real = os.replace

    def die_second(source, target):
        if str(source).endswith("new"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(fileio.os, "replace", die_second)
    with pytest.raises(KeyboardInterrupt):
        fileio.swap_folder(tmp_path / "new", tmp_path / "final")
    monkeypatch.undo()
    fileio.undo_swap(tmp_path / "final")
    assert (tmp_path / "final" / "a").read_bytes() == b"old" and (tmp_path / "new" / "a").read_bytes() == b"new"


def test_a_swap_that_the_disk_refuses_brings_the_old_folder_back(tmp_path, monkeypatch):
    fileio.atomic_write(tmp_path / "final" / "a", b"old")
    fileio.atomic_write(tmp_path / "new" / "a", b"new")

    def refuse_the_new(change, path):
        if change == "replace" and path.name == "new":
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(fileio, "before_change", refuse_the_new)
    with pytest.raises(ResourceError, match=r"cannot write .*new"):
        fileio.swap_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "a").read_bytes() == b"old" and files_in(tmp_path) == ["final", "new"]


@pytest.mark.row(48)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: fileio.append_line(path, "x"), lambda path: fileio.truncate(path, 0), fileio.remove,
        lambda path: fileio.create_exclusive(path, b"x"), lambda path: fileio.swap_folder(path, path),
        lambda path: fileio.write_json(path, 1),
    ],
)  # fmt: skip
def test_every_change_that_the_disk_refuses_is_one_resource_error(tmp_path, monkeypatch, write):
    (tmp_path / "a").write_text("old")

    def refuse(change, path):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(fileio, "before_change", refuse)
    with pytest.raises(ResourceError, match=r"cannot (write|remove) .*a(\.old)?: no"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old" and files_in(tmp_path) == ["a"]


# -- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1,]", "NaN", '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}',
        "[" * 100_000, "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40, "1" * 5000, "\ufeff\ufeff1", "nul", "'a'",
    ],
)  # fmt: skip
def test_json_that_is_not_strict_is_one_input_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json"):
        fileio.read_json(path)


def test_json_that_is_not_utf8_is_one_input_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'"\xff\xfe"')
    with pytest.raises(InputError, match="not valid JSON"):
        fileio.read_json(tmp_path / "a.json")


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert fileio.read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2", "[" * 100, "{" * 100, "- " * 2000, "? " * 2000, "[" * 40 + "]" * 40, BOMB, "&a [*a, *a]",
        "a: &x {b: 1}\nc: *x", "!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!unknown 1",
        "a: b: c", "\t- x", "@", "\0", "--- 1\n--- 2", "9" * 5000, "[a", "%YAML 9.9\n--- 1", "? [1, {a: 1}]\n: 2",
    ],
)  # fmt: skip
def test_yaml_that_is_not_plain_is_one_input_error(text):
    with pytest.raises(InputError, match=r"a\.yaml"):
        fileio.parse_yaml(text, "a.yaml")


@pytest.mark.row(17)
def test_yaml_tags_run_nothing(tmp_path):
    with pytest.raises(InputError):
        fileio.parse_yaml(f"!!python/object/apply:os.system ['touch {tmp_path}/pwned']", "a.yaml")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E3", 1000.0), ("-2e+1", -20.0), ("3", 3), ("yes", "yes"), ("no", "no"), ("~", None),
        ("12:30:00", "12:30:00"), ("010", 10), ("true", True), ("1.5", 1.5), ("", None),
    ],
)  # fmt: skip
def test_yaml_scalars_are_of_version_1_2(text, value):
    parsed = fileio.parse_yaml(text, "a.yaml")
    assert parsed == value and type(parsed) is type(value)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab01.e-+:[]{}&*!|>'\"#%@` \n\t\0,?~<="), max_size=40))
def test_no_text_makes_the_yaml_reader_raise_anything_else(text):
    try:
        fileio.parse_yaml(text, "a.yaml")
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("read", [fileio.read_json, fileio.read_yaml])
def test_readers_are_capped(tmp_path, read):
    path = tmp_path / "a"
    path.write_bytes(b" " * 2 * fileio.MB)
    with pytest.raises(InputError, match="more than the"):
        read(path)


@pytest.mark.row(12)
def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "loop", ".", "absent", "a" * 300, "a\0b", "\ud800"):
        with pytest.raises(InputError):
            fileio.read_bytes(tmp_path / name, 100)


@pytest.mark.row(14)
def test_an_unreadable_file_says_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fileio.Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(InputError, match=r"a\.json.*permission denied"):
        fileio.read_json(path)


@pytest.mark.parametrize("name", ["a/b.png", "./a/../a/b.png", "a b/ü.png"])
def test_paths_within_a_folder_are_resolved(tmp_path, name):
    assert fileio.inside(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", "\ud800", "link/x", "loop/x", None, 3]
)
def test_paths_that_leave_a_folder_are_refused(tmp_path, name):
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError):
        fileio.inside(tmp_path, name)


def header(size: int, text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", size) + text + body


def tensor_entry(**changes) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()
    return header(len(text), text, bytes(8))


SAFETENSORS_LIES = {
    "empty": b"", "short": b"\0\0\0", "header 2^40": header(1 << 40, b"{}"), "header 2^63": header(1 << 63, b"{}"),
    "header beyond the file": header(100, b"{}"), "not JSON": header(2, b"xx"), "truncated": tensor_entry()[:-1],
    "trailing bytes": tensor_entry() + b"x", "shape too large": tensor_entry(shape=[2**62, 4]),
    "offsets outside": tensor_entry(data_offsets=[0, 1 << 50]), "offsets reversed": tensor_entry(data_offsets=[8, 0]),
    "unknown type": tensor_entry(dtype="F99"), "negative shape": tensor_entry(shape=[-2]),
}  # fmt: skip


@pytest.mark.row(26)
@pytest.mark.parametrize("lie", SAFETENSORS_LIES)
def test_safetensors_headers_that_lie_are_one_input_error(tmp_path, lie):
    path = tmp_path / "a.safetensors"
    path.write_bytes(SAFETENSORS_LIES[lie])
    with pytest.raises(InputError, match=r"a\.safetensors"):
        fileio.read_tensors(path)


def test_the_honest_safetensors_file_of_these_lies_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(tensor_entry())
    assert fileio.read_tensors(tmp_path / "a.safetensors")[0]["x"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["plain.png", "with space.png", "line\nbreak", "esc\x1b[31m", "", "\udcff"])
def test_quoted_paths_are_printable(name):
    text = fileio.quoted(name)
    assert text.isprintable() and text
