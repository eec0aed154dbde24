"""Where a result is to go: room for it, and folders in whose place another can be put, whatever way leads there."""

import os

import pytest

from d2 import destination, fileio
from d2.errors import InputError, ResourceError


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    destination.require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(ResourceError, match="MB of disk needed"):
        destination.require_space(tmp_path / "a" / "b", 1 << 60)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        destination.require_space(tmp_path / "file" / "run", 1)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(destination.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match="permission denied"):
        destination.require_space(tmp_path / "run", 1)


def put(folder, text):
    fileio.atomic_write(folder / "a", text)


@pytest.mark.parametrize("way", ["run", "link", "inside/..", "../here/run"])
def test_whatever_way_leads_to_a_folder_it_is_the_folder_that_is_replaced(tmp_path, monkeypatch, way):
    here = tmp_path / "here"
    put(here / "run", b"old")
    (here / "run" / "inside").mkdir()
    (here / "link").symlink_to("run")
    monkeypatch.chdir(here / "run" if way == "inside/.." else here)
    new = fileio.sibling(way, ".new")
    assert os.path.realpath(new.parent) == str(here)
    put(new, b"new")
    fileio.swap_folder(new, way)
    assert (here / "run" / "a").read_bytes() == b"new" and sorted(os.listdir(here)) == ["link", "run"]
    os.rename(here / "run", fileio.sibling(here / "run", ".old"))
    fileio.undo_swap(here / "link")
    assert (here / "run" / "a").read_bytes() == b"new"


def test_the_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "run" / "images").mkdir(parents=True)
    for place, way in (("run", "."), ("run/images", ".."), ("run/images", tmp_path / "run")):
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(InputError, match="the folder you are in"):
            destination.require_replaceable(way)
    destination.require_replaceable(tmp_path / "run" / "other")


def test_a_mount_point_is_not_replaced():
    with pytest.raises(InputError, match="/ is a mount point"):
        destination.require_replaceable("/")
