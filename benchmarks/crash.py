"""Interrupts a stage in every way a machine knows, and counts what survived.

    python benchmarks/crash.py --stage generate|reconstruct|export|all [--kills 100] [--every 1] [--ranks 4]
                               [--out FILE]

The stage runs on its smallest input (benchmarks/stages.py).

* kills: SIGKILL or SIGTERM at random instants to a process of its own, up to three times in a row on the same folder.
* deaths: before the n-th change on disk (d2.fileio.before_change), for every n, all it does is lost; this and
  what follows happens within one process, which is a hundred times as fast.
* ranks (generate): one of two ranks is killed or stopped; rank 0 has to end with 7.
* failing writes: the n-th change fails, for every n, with ENOSPC, EIO or EFBIG, once or from then on, as SQLite tests
  its files; the stage has to end with 5, or with 0 where it can do without.

A case has survived when every file that bears its final name is whole and the run opens; it is bit-equal when the
same call then ends with the files of a run that nobody interrupted.  Exits with 1 when a case is lost.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from stages import STAGES, Stage

from d2 import fileio, machine
from d2.cli.stop import StopFlag
from d2.errors import D2Error
from d2.origin import CONFIG
from d2.recon.formats import ply, splat, spz
from d2.run import LEFTOVER, LOCK, Run

CODES = (errno.ENOSPC, errno.EIO, errno.EFBIG)
PATIENCE = 120.0  # seconds that any single run may take
Change = Callable[[str, Path], None]


def main(
    stage: str = "all", kills: int = 100, every: int = 1, ranks: int = 4, seed: int = 0, out: Path | None = None
) -> None:
    one_thread()
    names = list(STAGES) if stage == "all" else [stage]
    record = {name: campaign(name, kills, every, ranks if name == "generate" else 0, seed) for name in names}
    if out is not None:
        fileio.write_json(out, {"machine": machine.describe(), "stages": record})
    lost = [text for found in record.values() for text in found["lost"]]
    print(*lost, sep="\n", file=sys.stderr)
    raise SystemExit(1 if lost else 0)


def campaign(name: str, kills: int, every: int, ranks: int, seed: int) -> dict[str, Any]:
    """All interruptions of one stage; what was tried, survived and ended in the same bits."""
    with tempfile.TemporaryDirectory(prefix="d2-crash-") as place:
        sweep = Sweep(STAGES[name](Path(place)), Path(place), random.Random(f"{name}:{seed}"))
        sweep.kills(kills)  # these two first: a process that has computed cannot be forked
        sweep.ranks(ranks)
        sweep.forks = False
        sweep.deaths(every)
        sweep.failing_writes(every)
        print(name, sweep.record, f"{sweep.changes} changes, {sweep.seconds:.2f} s undisturbed", flush=True)
        return sweep.record | {"changes": sweep.changes, "lost": sweep.lost}


class Sweep:
    """One stage, its undisturbed result, and the tally."""

    def __init__(self, stage: Stage, place: Path, rng: random.Random, forks: bool = True):
        self.stage, self.place, self.rng, self.forks = stage, place, rng, forks
        self.lost: list[str] = []
        self.record = {
            "kills": {"tried": 0, "survived": 0},
            "deaths": {"tried": 0, "survived": 0},
            "ranks": {"tried": 0, "survived": 0},
            "write_failures": {"tried": 0, "survived": 0},
            "resumes": {"tried": 0, "bit_equal": 0},
        }
        self.folder = place / "out"
        self.require_done(self.call(stage.prepare))
        self.require_done(self.call(self.work))  # kernels compile
        fileio.remove(self.folder)
        count, begin = place / "count", time.monotonic()
        self.require_done(self.call(self.work, counting(count)))
        self.seconds, self.changes = time.monotonic() - begin, len(count.read_bytes())
        self.expected = stage.result(self.folder)

    def kills(self, count: int) -> None:
        """At random instants."""
        for k in range(count):
            signum = signal.SIGTERM if k % 4 == 3 else signal.SIGKILL
            fileio.remove(self.folder)
            faults = []
            for _ in range(self.rng.randint(1, 3)):
                code = self.in_a_process(self.work, signum=signum, after=self.rng.uniform(0, self.seconds))
                faults += self.faults()
                expected = (0, 8, -signal.SIGKILL) if signum == signal.SIGKILL else (0, 8, 143)
                faults += [] if code in expected else [f"ended with {code}: {self.said()}"]
            self.tally("kills", f"{signum.name} {k}", faults)

    def deaths(self, every: int) -> None:
        """Right before every n-th change on disk."""
        for n in range(1, self.changes + 1, every):
            fileio.remove(self.folder)
            code = self.call(self.work, dying(n))
            faults = [] if code == -signal.SIGKILL else [f"ended with {code}: {self.said()}"]
            self.tally("deaths", f"death before change {n}", faults + self.faults())

    def ranks(self, count: int) -> None:
        """Rank 1 of two is lost."""
        for k in range(count):
            signum = (signal.SIGKILL, signal.SIGSTOP)[k % 2]
            fileio.remove(self.folder)
            code = self.in_a_process(lambda signum=signum: self.lose_a_rank(signum))
            faults = [] if code in (0, 7) else [f"ended with {code}: {self.said()}"]
            self.tally("ranks", f"{signum.name} to a rank", faults + self.faults())

    def failing_writes(self, every: int, codes: tuple[int, ...] = CODES) -> None:
        """Every n-th change, once or, with a full disk, from then on."""
        ways = [(code, False) for code in codes] + [(errno.ENOSPC, True)]
        for n, (code, ever_after) in itertools.product(range(1, self.changes + 1, every), ways):
            fileio.remove(self.folder)
            ended = self.call(self.work, failing(n, code, ever_after))
            faults = [] if ended in (0, 5) else [f"ended with {ended}: {self.said()}"]
            what = f"{errno.errorcode[code]} at change {n}" + " and all later ones" * ever_after
            self.tally("write_failures", what, faults + self.faults())

    def tally(self, kind: str, what: str, faults: list[str]) -> None:
        """Counts a case, and resumes it."""
        self.record[kind]["tried"] += 1
        self.record[kind]["survived"] += not faults
        self.record["resumes"]["tried"] += 1
        difference = self.resumed()
        self.record["resumes"]["bit_equal"] += not difference
        problems = faults + ([difference] if difference else [])
        self.lost += [f"{type(self.stage).__name__}, {what}: {problem}" for problem in problems]

    def resumed(self) -> str:
        """What differs after the same call went through; empty when nothing does."""
        try:
            finished = self.stage.done(self.folder)
        except D2Error:
            finished = False
        code = self.call(self.work)
        if code != (8 if finished and type(self.stage).__name__ != "Export" else 0):
            return f"the same call again ended with {code}: {self.said()}"
        found = self.stage.result(self.folder)
        different = sorted(k for k in found.keys() | self.expected.keys() if found.get(k) != self.expected.get(k))
        if not different and not finished:
            different = [path.name for path in self.folder.rglob(".*") if LEFTOVER.fullmatch(path.name)]
        return f"after resuming these differ: {', '.join(different[:3])}" if different else ""

    def faults(self) -> list[str]:
        """What is wrong with the folder as it stands."""
        found = []
        if (self.folder / "run.json").exists():
            found += attempt(lambda: Run.open(self.folder), "run.json")
            if self.stage.done(self.folder):
                for name in Run.open(self.folder).manifest["stages"]:
                    folder = self.folder if name == "generate" else self.folder / "recon" / "main"
                    found += attempt(lambda name=name, at=folder: intact(self.folder, name, at), name)
        for path in self.folder.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(self.folder).parts)
            if path.is_file() and not hidden and path.suffix in READERS:
                found += attempt(lambda path=path: READERS[path.suffix](path), path.name)
        return found

    # -- work --------------------------------------------------------------------------------------------

    def call(self, work: Callable[[], None], change: Change | None = None) -> int:
        """The exit code of `work`, in a child or here; what was said goes to a file."""
        if self.forks:
            return self.in_a_process(work, change)
        text, code = "", 0
        try:
            with seam(change):
                work()
        except Gone:
            bury(self.folder)
            code = -signal.SIGKILL
        except D2Error as error:
            text, code = str(error), error.exit_code
        except Exception:
            text, code = traceback.format_exc(), 1
        (self.place / "said").write_text(text)
        return code

    def work(self) -> None:
        with StopFlag() as stop:
            self.stage.work(self.folder, stop)

    def lose_a_rank(self, signum: signal.Signals) -> None:
        """Work on two ranks, with a child that strikes rank 1 at a random instant once the two have met."""
        parent, wait = os.getpid(), self.rng.uniform(0, self.seconds)
        if os.fork() == 0:
            deadline = time.monotonic() + PATIENCE
            while not (self.folder / CONFIG).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(wait)
            for pid in children(parent) - {os.getpid()}:
                os.kill(pid, signum)
            os._exit(0)
        self.stage.work(self.folder, processes=2)

    def in_a_process(
        self, work: Callable[[], None], change: Change | None = None, signum: int = 0, after: float = PATIENCE
    ) -> int:
        """The exit code of `work` in a child, negative where a signal ended it; `signum` is sent `after` seconds."""
        pid = os.fork()
        if pid == 0:
            self.be_the_child(work, change)
        begin = time.monotonic()
        sent = False
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - begin > PATIENCE:
                os.kill(pid, signal.SIGKILL)
            elif signum and not sent and time.monotonic() - begin >= after:
                os.kill(pid, signum)
                sent = True
            time.sleep(0.001)

    def be_the_child(self, work: Callable[[], None], change: Change | None) -> None:
        code = 1
        try:
            descriptor = os.open(self.place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            with seam(change):
                work()
            code = 0
        except D2Error as error:
            os.write(2, str(error).encode())
            code = error.exit_code
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(code)

    def said(self) -> str:
        return (self.place / "said").read_text(errors="replace")[-1500:].strip()

    def require_done(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"without any disturbance it ended with {code}: {self.said()}")


# -- what happens at a change on disk --------------------------------------------------------------------


def counting(path: Path) -> Change:
    """A byte in a file for each."""

    def change(what: str, where: Path) -> None:
        with open(path, "ab") as file:
            file.write(b".")

    return change


class Gone(BaseException):
    """The process is dead: nothing it does from now on reaches the disk."""


def dying(n: int) -> Change:
    """From the n-th on nothing happens any more, clearing up included."""
    count = itertools.count(1)

    def change(what: str, where: Path) -> None:
        if next(count) >= n:
            raise Gone

    return change


def bury(folder: Path) -> None:
    """The lock of a process that has died in name only gets an owner that is really dead."""
    for lock in (folder / LOCK, folder.with_name(f".{folder.name}.new") / LOCK):
        if lock.exists():
            fileio.write_json(lock, {"pid": 1 << 30, "host": socket.gethostname(), "started": "0"})


@contextlib.contextmanager
def seam(change: Change | None) -> Iterator[None]:
    """Within, every change on disk passes `change` first."""
    before = fileio.before_change
    if change is not None:
        fileio.before_change = change  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        fileio.before_change = before


def failing(n: int, code: int, ever_after: bool = False) -> Change:
    """The n-th fails, and all later ones where asked; to make space is always possible."""
    count = itertools.count(1)

    def change(what: str, where: Path) -> None:
        at = next(count)
        if at == n or (ever_after and at > n and what != "remove"):
            raise OSError(code, os.strerror(code))

    return change


# -- what a folder must be -------------------------------------------------------------------------------


def attempt(check: Callable[[], object], what: str) -> list[str]:
    try:
        check()
    except Exception as error:
        return [f"{what}: {type(error).__name__}: {error}"]
    return []


def intact(folder: Path, stage: str, at: Path) -> None:
    """Every file of a committed stage is what the stage recorded."""
    record = Run.open(folder).stage(stage) or {}
    for name, digest in record.get("files", {}).items():
        if fileio.sha256(at / name) != digest:
            raise ValueError(f"{name} is not what was committed")


def load_image(path: Path) -> None:
    Image.open(path).load()


READERS: dict[str, Callable[[Path], object]] = {
    ".json": fileio.read_json, ".yaml": fileio.read_yaml, ".safetensors": fileio.read_tensors, ".png": load_image,
    ".ply": ply.read, ".spz": spz.read, ".splat": splat.read,
}  # fmt: skip


def children(pid: int) -> set[int]:
    """Processes that a process started."""
    try:
        return {int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def one_thread() -> None:
    """Begins again with one thread: a process with more cannot be forked, and bits depend on their number."""
    wanted = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


if __name__ == "__main__":
    typer.run(main)
