"""What a long command shows: a progress bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from d2 import phases
from d2.recon import pipeline

if TYPE_CHECKING:
    from d2.recon.train import Progress

PLAIN_EVERY = 10.0  # seconds between two lines when stderr is not a terminal


def observer(quiet: bool) -> Console | Bar | Plain:
    """The right one for this stderr."""
    if quiet:
        return Console()
    return Bar() if sys.stderr.isatty() else Plain()


class Console(pipeline.Observer, phases.Observer, AbstractContextManager):
    """Silent; the base of the others.  Both stages report to it."""

    def __exit__(self, *exception: object) -> None:
        return None


class Plain(Console):
    """A line now and then."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.last = 0.0
        self.phases: dict[str, tuple[float, int]] = {}  # when each began, and how much was done then

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, progress: Progress, best_psnr: float | None) -> None:
        now = time.monotonic()
        if self.begin is None:
            self.begin = self.last = now  # what came before (reading, carving) says nothing about the speed
        if now - self.last < PLAIN_EVERY:
            return
        self.last = now
        left = (now - self.begin) * (1 - progress.fraction) / max(progress.fraction, 1e-9)
        quality = f", {best_psnr:.2f} dB" if best_psnr else ""
        done = f"{100 * progress.fraction:.0f} %, iteration {progress.iteration}"
        self.message(f"{done}{quality}, {progress.gaussians} Gaussians, {left:.0f} s left")

    def phase(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        begin, before = self.phases.setdefault(name, (now, done))
        if done < total and now - self.last < PLAIN_EVERY:
            return
        self.last = now
        left = f", {(now - begin) * (total - done) / (done - before):.0f} s left" if before < done < total else ""
        self.message(f"{name}: {done} of {total}{left}")


class Bar(Console):
    """A rich progress bar with quality, count and time left."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar: Any = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[quality]}"),
            TimeRemainingColumn(), console=RichConsole(stderr=True),
        )  # fmt: skip
        self.task: Any = None
        self.phases: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def message(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def progress(self, progress: Progress, best_psnr: float | None) -> None:
        quality = f"iteration {progress.iteration}" + (f" · {best_psnr:.2f} dB" if best_psnr else "")
        quality += f" · {progress.gaussians} Gaussians"
        if self.task is None:
            self.task = self.bar.add_task("Fitting", total=1.0, quality=quality)
        self.bar.update(self.task, completed=progress.fraction, quality=quality)

    def phase(self, name: str, done: int, total: int) -> None:
        if name not in self.phases:
            self.phases[name] = self.bar.add_task(name.capitalize(), total=total, quality="")
        self.bar.update(self.phases[name], completed=done, quality=f"{done} of {total}")
