"""The three streams of a process: what stdout refuses is told in one line, what stderr refuses loses no work."""

from __future__ import annotations

import io
import os
import sys

from d2.errors import ResourceError

_placeholders: list[io.FileIO] = []


def prepare() -> None:
    """Makes stdout and stderr take any character, stdout refuse in one line, and stderr never refuse.

    A stream that was closed takes everything and keeps nothing; its number is taken, lest a library's warnings, which
    go to number 2, end up in a file that happens to have it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            placeholder = io.FileIO(os.devnull)
            os.set_inheritable(placeholder.fileno(), True)
            _placeholders.append(placeholder)
    sys.stdout = _text(sys.stdout, _Required)
    sys.stderr = _text(sys.stderr, _Dispensable)


def _text(stream: object, kind: type[_Dispensable]) -> io.TextIOBase:
    """A text stream over what lies below `stream`, None when it was closed; what is no file stays as it is."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Dispensable(None)), "utf-8", "backslashreplace", write_through=True)
    assert isinstance(stream, io.TextIOBase)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves the buffer out
    if not isinstance(raw, io.RawIOBase):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(kind(raw)), stream.encoding, "backslashreplace", line_buffering=True, write_through=True
    )


class _Dispensable(io.RawIOBase):
    """Takes everything, whether or not what lies below does."""

    def __init__(self, raw: io.RawIOBase | None) -> None:
        self.raw = raw
        self.given_up = raw is None

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.raw is not None and self.raw.isatty()

    def fileno(self) -> int:
        if self.raw is None:
            raise io.UnsupportedOperation("fileno")
        return self.raw.fileno()

    def write(self, data) -> int:
        try:
            written = len(data) if self.raw is None or self.given_up else self.raw.write(data)
        except OSError as error:
            self.given_up = True  # what is left in the buffer must not be refused a second time, at exit
            written = self.refused(error, len(data))
        return written or 0

    def refused(self, error: OSError, count: int) -> int:
        return count


class _Required(_Dispensable):
    """Raises ResourceError where what lies below takes nothing, but for a reader that has left."""

    def refused(self, error: OSError, count: int) -> int:
        if isinstance(error, BrokenPipeError):
            raise error
        raise ResourceError(f"cannot write standard output: {error.strerror}") from error
