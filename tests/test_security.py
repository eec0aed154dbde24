"""What SECURITY.md promises: every test it names is there, and what no other test holds."""

from __future__ import annotations

import ast
import os
import re
import socket
import stat
from pathlib import Path

import pytest
from faults.tiny import tiny_reconstruct
from surroundings import ROOT

from d2 import fileio, launch
from d2.cli import app
from d2.recon import exports

NAMED = re.compile(r"\| (tests/[\w/]+\.py)::(\w+) \|$", re.MULTILINE)


def test_every_line_of_the_threat_table_names_a_test_that_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = NAMED.findall(text)
    assert len(named) == sum(line.startswith("| ") for line in text.splitlines()) - 1 > 15
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_the_way_from_a_picture_to_files_opens_no_connection(generate, ball, tiny_dataset, tmp_path, monkeypatch):
    """Pictures in, Gaussians and the page out; Unix sockets aside, nothing is connected, bound or looked up."""

    def refuse(*arguments, **named):
        pytest.fail(f"the network was asked for: {arguments[1:]}")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    generate(ball, tmp_path / "run", references_only=True)
    folder = tiny_reconstruct(tiny_dataset, tmp_path / "out").folder
    exports.export(folder, ["ply", "html", "contact"], tmp_path / "export", frames=2)
    with pytest.raises(pytest.fail.Exception):
        socket.create_connection(("localhost", 80))


def test_ranks_of_one_machine_meet_on_it_alone():
    assert launch.LOCAL == "127.0.0.1"
    source = (ROOT / "d2" / "launch.py").read_text(encoding="utf-8")
    stores = re.findall(r"TCPStore\((\w+)|create_server\(\((\w+)", source)
    assert len(stores) >= 3 and {a or b for a, b in stores} == {"LOCAL"}


def test_temporary_files_are_private_until_they_have_their_name(tmp_path):
    before = os.umask(0)
    try:
        with fileio.atomic_path(tmp_path / "a.png") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            assert re.fullmatch(r"\.a\.[a-z0-9_]{8}\.png", temporary.name)
    finally:
        os.umask(before)


def test_the_log_of_an_error_is_private(monkeypatch, tmp_path, capsys):
    def fail(*arguments, **named):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit):
        app.main()
    log = re.search(r"details in (.*)\)", capsys.readouterr().err)
    assert log and "our bug" in Path(log[1]).read_text()
    assert stat.S_IMODE(os.stat(os.path.dirname(log[1])).st_mode) == 0o700
