"""What holds for every fault: the listed exit code, one clear line, and nothing that existed has changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from d2.errors import D2Error

SOON = 60.0  # seconds, on a machine that others use too


class Outcome(NamedTuple):
    """What a finished command left."""

    code: int
    stdout: str
    stderr: str


def expect_fault(action: Callable[[], Any], code: int, *mentioned: str, folder: Path | None = None) -> str:
    """Runs `action`, a Python call or a command that gives an Outcome, which must fail with `code`.

    Its message must be one line, hold every text of `mentioned`, and leave all files under `folder` as they were.
    Returns the message.
    """
    before, begin = digests(folder), time.monotonic()
    try:
        outcome = action()
    except D2Error as error:
        outcome = Outcome(error.exit_code, "", f"error: {error}\n")
    assert isinstance(outcome, Outcome), f"nothing was refused, got {outcome!r}"
    line = require_fault(outcome, begin, before, folder)
    assert outcome.code == code, outcome
    for text in mentioned:
        assert text in line, f"{text!r} is not in {line!r}"
    return line


def require_fault(outcome: Outcome, begin: float, before: dict[str, str], folder: Path | None) -> str:
    """What is the same for every fault that began at `begin` with the files `before`; returns the message."""
    assert time.monotonic() - begin < SOON
    assert "Traceback" not in outcome.stderr, outcome.stderr
    lines = outcome.stderr.splitlines()
    assert lines and lines[-1].startswith("error: ") and lines[-1] != "error: ", outcome
    assert sum(line.startswith("error: ") for line in lines) == 1, outcome.stderr
    after = digests(folder)
    assert {name: after.get(name) for name in before} == before, "files that existed before have changed"
    leftovers = [name for name in after.keys() - before.keys() if Path(name).name.startswith(".")]
    assert not leftovers, f"left behind: {leftovers}"
    return lines[-1]


def digests(folder: Path | None) -> dict[str, str]:
    """sha256 of every regular file under a folder."""
    if folder is None:
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
