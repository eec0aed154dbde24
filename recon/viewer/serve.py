"""A server for one machine: a fixed list of addresses on 127.0.0.1, GET and HEAD, nothing else."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from d2.errors import D2Error, InputError, ResourceError
from d2.recon.viewer.live import Live

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # that a browser on this machine calls it by
FIRST_PORT, PORTS_TRIED = 8417, 32
PATIENCE = 10.0  # seconds for a request to arrive


class Answer(NamedTuple):
    """What an address gives; None: not there yet."""

    kind: str  # media type
    make: Callable[[], bytes | None]


class Server(ThreadingHTTPServer):
    """Answers what is in `answers`, by exact path."""

    daemon_threads = True
    block_on_close = False  # a client that says nothing must not keep the server from ending
    request_queue_size = 128

    def __init__(self, port: int, answers: dict[str, Answer]):
        self.answers = answers
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def answers_of(live: Live) -> dict[str, Answer]:
    """What the live page needs."""
    page = Answer("text/html; charset=utf-8", live.page)
    return {
        "/": page,
        "/index.html": page,
        "/status.json": Answer("application/json", lambda: json.dumps(live.status(), allow_nan=False).encode()),
        "/asset.bin": Answer("application/octet-stream", live.asset),
    }


def open_server(answers: dict[str, Answer], port: int | None = None) -> Server:
    """Listens on `port`, by default on the first free one from 8417 on. Raises ResourceError where none is free."""
    if port is not None and not 0 <= port <= 65535:
        raise InputError(f"--port must be in 0..65535, got {port}")
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if port is None else (port,):
        try:
            return Server(candidate, answers)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ResourceError(f"cannot listen on {HOST}:{candidate}: {error.strerror}") from error
    what = f"port {port} is" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1} are"
    raise ResourceError(f"{what} taken; choose another --port, or 0 for any")


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "d2", ""
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        if self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"):
            self.close_connection = True  # a body would be read as the next request
        if not self._is_for_us():  # another site's name that points here: DNS rebinding
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        answer = self.server.answers.get(self.path.partition("?")[0])
        try:
            body = answer.make() if answer else None
        except D2Error as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", str(error).encode(), with_body)
            return
        if answer is None or body is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send(HTTPStatus.OK, answer.kind, body, with_body)

    def _is_for_us(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        allowed = {f"{name}:{self.server.server_port}" for name in NAMES}
        if self.server.server_port == 80:
            allowed |= set(NAMES)
        return len(hosts) == 1 and hosts[0].strip().lower() in allowed

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status, "text/plain; charset=utf-8", status.phrase.encode(), self.command != "HEAD")

    def _send(self, status: HTTPStatus, kind: str, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "SAMEORIGIN",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself: methods other than GET and HEAD, malformed requests."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        body = status.phrase.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the terminal belongs to the user."""
