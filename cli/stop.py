"""SIGINT and SIGTERM ask the loop to stop after its step; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
from contextlib import AbstractContextManager
from types import FrameType


class StopFlag(AbstractContextManager):
    """Calling it tells the signal that arrived, or 0."""

    def __init__(self) -> None:
        self.signum = 0

    def __call__(self) -> int:
        return self.signum

    def __enter__(self) -> StopFlag:
        self.before = {s: signal.signal(s, self._arrived) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        if self.signum:  # the process is on its way out: a second signal must still end it at once, not as a traceback
            return
        self.restore()

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum
        with contextlib.suppress(OSError):  # not print: it may be what was interrupted, and is not reentrant
            os.write(2, b"stopping after this step; once more to stop at once\n")
