"""Progress of work that counts: a bar a task with the time left on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Report = Callable[[str, int, int], None]  # task, done, total
PLAIN_EVERY = 10.0  # seconds between two lines when stderr is not a terminal


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yields a callback that shows how far each task is, and how long it will take."""
    if quiet:
        yield lambda task, done, total: None
    elif not sys.stderr.isatty():
        yield _lines()
    else:
        with _bars() as report:
            yield report


def _lines() -> Report:
    begun: dict[str, tuple[float, int]] = {}  # task -> when it was first heard of, and how much was done then
    last = time.monotonic()

    def report(task: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        begin, before = begun.setdefault(task, (now, done))
        if now - last < PLAIN_EVERY or done >= total:
            return
        last = now
        left = f", {(now - begin) * (total - done) / (done - before):.0f} s left" if done > before else ""
        print(f"{task}: {done} of {total}{left}", file=sys.stderr, flush=True)

    return report


@contextlib.contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done)

        yield report
