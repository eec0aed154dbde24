"""The server answers its list and nothing else, to this machine only; the page follows a fit to its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import random_asset, tiny_views
from surroundings import cli_environment

from d2 import fileio
from d2.errors import ConflictError, InputError, ResourceError
from d2.recon import checkpoint, train
from d2.recon.viewer import live, pack, reference, serve
from d2.run import Run

JUNK = (
    b"\x00" * 999,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"A" * 70_000,
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
    b"\x16\x03\x01\x02\x00",
)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[serve.Server]:
    server = serve.open_server(serve.answers_of(live.Live(folder)), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(
    server: serve.Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


@pytest.fixture
def begun(tmp_path) -> Path:
    """A reconstruction that has just begun: configuration and reference pictures, no model."""
    run = Run.create(tmp_path / "bear", fps=12)
    folder = run.folder / "recon" / "main"
    fileio.write_yaml(folder / "config.yaml", {"iterations": 400})
    reference.save(folder, tiny_views())
    return folder


def save_checkpoint(folder: Path, iteration: int, count: int) -> None:
    state = train.state_of(random_asset(count), 1.0)
    state.iteration = iteration
    checkpoint.save(folder / "ckpt", state, {"log_bytes": 0})
    line = {"iteration": iteration, "loss": 0.1, "gaussians": count, "psnr_heldout": 20 + iteration / 100}
    fileio.append_line(folder / "metrics.jsonl", json.dumps(line))


def test_addresses_of_the_list_are_answered_and_no_others(made):
    with served(made) as server:
        status, body, headers = ask(server, "/?autoplay=0")
        assert status == 200 and body.startswith(b"<!doctype html>") and headers["Content-Type"].startswith("text/html")
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Access-Control-Allow-Origin"] is None
        assert ask(server, "/asset.bin")[1][:4] == pack.MAGIC
        assert json.loads(ask(server, "/status.json")[1])["done"] is True
        assert ask(server, "/asset.bin", "HEAD")[:2] == (200, b"")
        for path in ("/run.json", "/../run.json", "/%2e%2e/run.json", "/status.json/", "/etc/passwd", "/asset.bin%00"):
            assert ask(server, path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"):
            assert ask(server, "/", method)[0] == 405, method


@pytest.mark.row(69)
def test_row_69_listens_on_this_machine_only_and_to_its_own_name_only(made):
    with served(made) as server:
        assert server.server_address[0] == "127.0.0.1"
        port = server.server_port
        for host in (
            "evil.com",
            f"evil.com:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port}.evil.com",
            "",
            f"localhost:{port + 1}",
        ):
            assert ask(server, "/", Host=host)[0] == 403, host
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"LOCALHOST:{port}"):
            assert ask(server, "/status.json", Host=host)[0] == 200, host


@pytest.mark.row(70)
def test_row_70_junk_and_silent_clients_keep_nobody_else_from_the_page(made):
    with served(made) as server:
        address = ("127.0.0.1", server.server_port)
        silent = [socket.create_connection(address) for _ in range(100)]
        for junk in JUNK:
            with socket.create_connection(address) as client:
                client.sendall(junk)
                client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    assert b"200 OK" not in client.recv(4096)
        assert ask(server, "/")[0] == 200
        for client in silent:
            client.close()


@pytest.mark.row(70)
def test_a_taken_port_is_told_and_by_default_the_next_is_used(made):
    with served(made) as server, pytest.raises(ResourceError, match=f"port {server.server_port} is taken"):
        serve.open_server({}, server.server_port)
    first, second = serve.open_server({}), serve.open_server({})
    assert second.server_port > first.server_port >= serve.FIRST_PORT
    first.server_close(), second.server_close()
    with pytest.raises(InputError, match="--port"):
        serve.open_server({}, 70_000)


def test_status_follows_a_fit_from_nothing_to_its_end(begun):
    watched = live.Live(begun)
    status = watched.status()
    assert status["version"] == "" and not status["done"] and "first model" in status["message"]
    assert watched.asset() is None and b'"live":true' in watched.page()
    save_checkpoint(begun, 100, 200)
    first = watched.status()
    assert ["Progress", "100 of 400 iterations"] in first["facts"] and first["curve"] == [[100, 21.0]]
    asset = watched.asset()
    save_checkpoint(begun, 200, 300)
    second = watched.status()
    assert second["version"] != first["version"] and watched.asset() != asset and not second["done"]
    random_asset(300).save(begun / "gaussians.safetensors")
    last = watched.status()
    assert last["done"] and last["version"] != second["version"] and "Progress" not in dict(last["facts"])


def test_a_replacement_in_the_making_is_followed(begun):
    random_asset(100).save(begun / "gaussians.safetensors")
    new = begun.with_name(".main.new")
    fileio.write_yaml(new / "config.yaml", {"iterations": 50})
    save_checkpoint(new, 10, 50)
    status = live.Live(live.find(begun.parents[1])).status()
    assert not status["done"] and status["version"].startswith("step_") and "10 of 50" in str(status["facts"])


def test_a_damaged_checkpoint_leaves_the_last_good_model(begun):
    save_checkpoint(begun, 100, 200)
    watched = live.Live(begun)
    version = watched.status()["version"]
    (begun / "ckpt" / "step_00000200.safetensors").write_bytes(b"half a file")
    assert watched.status()["version"] == version and watched.asset() is not None


def test_what_is_found_and_what_is_not(begun, made, tmp_path):
    assert live.find(begun.parents[1]) == live.find(begun) == begun
    assert live.find(made / "gaussians.safetensors") == made
    Run.create(tmp_path / "empty")
    with pytest.raises(ConflictError, match="d2 reconstruct"):
        live.find(tmp_path / "empty")
    with pytest.raises(InputError, match="neither a run folder"):
        live.find(tmp_path)


@pytest.mark.row(71)
def test_row_71_ctrl_c_ends_it_within_two_seconds_and_frees_the_port(made, tmp_path):
    command = [sys.executable, "-m", "d2.cli.app", "view", str(made), "--serve", "--no-open", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=cli_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("/")[2].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            begin = time.monotonic()
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(10) in (0, 130) and time.monotonic() - begin < 2
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.browser
def test_page_shows_newer_models_as_they_come(chromium, begun):
    from pages import opened

    save_checkpoint(begun, 100, 200)
    with served(begun) as server, opened(chromium, server.url + "index.html") as tab:
        assert tab.evaluate("__viewer.stage.asset.header.count") <= 200
        tab.click("#info")
        assert "100 of 400" in tab.inner_text("#facts")
        save_checkpoint(begun, 200, 900)
        tab.wait_for_timeout(3500)
        assert tab.evaluate("__viewer.stage.asset.header.count") > 300
        assert "200 of 400" in tab.inner_text("#facts")


@pytest.mark.browser
def test_web_folder_plays_from_a_site(chromium, made, tmp_path):
    from pages import opened

    from d2.recon.exports import export

    page = export(made, ["web"], tmp_path)["web"]
    answers = {
        "/site/index.html": serve.Answer("text/html; charset=utf-8", page.read_bytes),
        "/site/asset.bin": serve.Answer("application/octet-stream", (page.parent / "asset.bin").read_bytes),
    }
    server = serve.open_server(answers, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with opened(chromium, server.url + "site/index.html", "?ui=0&autoplay=0&t=0.5&az=20") as tab:
        assert not tab.is_visible("#bar") and tab.evaluate("__viewer.camera.az") == 20
    server.shutdown()
    server.server_close()
