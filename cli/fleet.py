"""Workers of `d2 batch`: a process of d2 for each asset, handed out by concurrent.futures or by Ray."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2 import fileio, machine
from d2.cli.jobs import Job
from d2.cli.run import EXPORTS
from d2.errors import InputError, SetupError, WorkerError
from d2.run import Run, is_run

D2 = (sys.executable, "-m", "d2.cli.app")
LOGS = "logs"  # folder beside the runs: NAME.log, what the asset's process said; NAME.json, how it ended
POLL = 0.2  # seconds between two looks at a process, and at whether to stop
RETRIED = (5, 7)  # exit codes that another time may not end with: memory, a worker that died
STAGE = "reconstruct:main"


@dataclass(frozen=True)
class Settings:
    """What all assets of a batch share."""

    out: Path  # absolute; a run folder for each asset in it
    preset: str
    reconstruct_preset: str
    sets: tuple[str, ...]  # fields of stage 1
    reconstruct_sets: tuple[str, ...]
    weights: str | None
    remove_background: bool
    overwrite: bool
    retries: int  # of an asset whose process died or lacked memory
    threads: int  # CPU threads of each process


@dataclass(frozen=True)
class Record:
    """How an asset ended."""

    name: str
    source: str
    basis: str  # digest of input and settings: what a finished asset is skipped by
    code: int  # exit code; 0 is success
    error: str  # one line, empty after success
    seconds: float
    attempts: int
    host: str
    psnr: float | None  # dB on held-out cells
    gaussians: int | None
    kept: bool = False  # finished by an earlier batch


def finished(job: Job, settings: Settings) -> Record | None:
    """What an earlier batch recorded about this very job, where its reconstruction is still there."""
    path = settings.out / LOGS / f"{job.name}.json"
    home = settings.out / job.name
    if settings.overwrite or not path.is_file() or not is_run(home):
        return None
    found = fileio.read_json(path)
    try:
        record = Record(**(found | {"kept": True}))
    except TypeError as error:
        raise InputError(f"{fileio.quoted(path)} is not a record of d2 batch; remove it") from error
    if record.code or record.basis != basis(job, settings) or Run.open(home).stage(STAGE) is None:
        return None
    return record


def locally(
    jobs: list[Job],
    settings: Settings,
    workers: int,
    devices: list[str],  # shared out among the workers in turn
    should_stop: Callable[[], int],
) -> Iterator[Record]:
    """Yields each job's record as it ends; when `should_stop()` says so, what runs saves and ends, nothing starts."""
    stopping = threading.Event()
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for worker in range(workers):
        free.put(devices[worker % len(devices)])

    def task(job: Job) -> Record:
        device = free.get()
        try:
            return work(job, settings, device, stopping.is_set)
        finally:
            free.put(device)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(task, job) for job in jobs}
        while pending:
            done, pending = concurrent.futures.wait(pending, POLL, concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)
            if should_stop() and not stopping.is_set():
                stopping.set()
                pending = {future for future in pending if not future.cancel()}


def on_ray(
    jobs: list[Job],
    settings: Settings,
    address: str,  # "local" starts one here, "auto" finds one, else host:port
    workers: int | None,  # CPUs of a local one
    device: str,
    per_gpu: int,  # assets that share a GPU
    should_stop: Callable[[], int],
) -> Iterator[Record]:
    """Like `locally`, one Ray task an asset; every machine needs d2, and the folders under the same paths.

    A task asks for a CPU, and for 1/per_gpu of a GPU where the cluster has any and `device` is not cpu.  Ray repeats
    tasks whose machine is lost.  Raises SetupError where there is no Ray or no cluster.
    """
    ray: Any = machine.require("ray")
    own = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise SetupError(f"no Ray cluster at {address!r}: {str(error)[:300]}") from error
    try:
        has_gpus = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        remote = ray.remote(num_cpus=1, num_gpus=1 / per_gpu if has_gpus else 0, max_retries=settings.retries)(work)
        tasks = {remote.remote(job, settings, device): job for job in jobs}
        stopped = False
        while tasks:
            done, _ = ray.wait(list(tasks), num_returns=1, timeout=POLL)
            for task in done:
                job = tasks.pop(task)
                try:
                    yield ray.get(task)
                except ray.exceptions.TaskCancelledError:
                    continue
                except ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:300]
                    yield _record(job, settings, WorkerError.exit_code, f"its Ray task was lost: {reason}", 0.0, 0)
            if should_stop() and not stopped:
                stopped = True
                for task in tasks:
                    ray.cancel(task)
    finally:
        ray.shutdown()


def work(job: Job, settings: Settings, device: str, stopping: Callable[[], bool] = lambda: False) -> Record:
    """Runs the commands of one asset and writes how it went beside the runs; the folder itself says what is done."""
    begin, attempts, code, error, said = time.monotonic(), 0, 0, "", b""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        environment[name] = str(settings.threads)
    while attempts <= settings.retries and not (attempts and stopping()):
        attempts += 1
        for words in commands(job, settings, device):
            code, output = run([*D2, *words], environment, stopping)
            said += output
            if code:
                break
        error = _reason(code, said) if code else ""
        if code >= 0 and code not in RETRIED:
            break
    record = _record(job, settings, 128 - code if code < 0 else code, error, time.monotonic() - begin, attempts)
    fileio.atomic_write(settings.out / LOGS / f"{job.name}.log", said)
    fileio.write_json(settings.out / LOGS / f"{job.name}.json", asdict(record))
    return record


def commands(job: Job, settings: Settings, device: str) -> Iterator[list[str]]:
    """The words after `d2`, command by command; each resumes what an interrupted one left."""
    home = str(settings.out / job.name)
    replace = ["--overwrite"] if settings.overwrite else []
    options = dict(job.options)
    if job.kind == "dataset":
        if settings.overwrite or not is_run(home) or Run.open(home).stage(STAGE) is None:
            preset = options.pop("reconstruct-preset", settings.reconstruct_preset)
            words = ["reconstruct", str(job.source), "--out", home, "--preset", preset, "--device", device, "--quiet"]
            sets = [word for text in settings.reconstruct_sets for word in ("--set", text)]
            yield [*words, *sets, *(f"--{key}={value}" for key, value in options.items()), *replace]
        yield ["export", home, "--format", ",".join(EXPORTS), "--overwrite", "--quiet"]
        return
    shared = {"preset": settings.preset, "reconstruct-preset": settings.reconstruct_preset, "device": device}
    shared |= {"weights": settings.weights} if settings.weights is not None else {}
    words = [f"--{key}={value}" for key, value in (shared | options).items()]
    words += [word for text in settings.sets for word in ("--set", text)]
    words += [word for text in settings.reconstruct_sets for word in ("--reconstruct-set", text)]
    words += ["--no-remove-bg"] * (not settings.remove_background) + replace
    given = ["--asset", str(job.source)] if job.kind == "solid" else [str(job.source)]
    yield ["run", *given, "--out", home, *words, "--quiet"]


def run(words: list[str], environment: dict[str, str], stopping: Callable[[], bool]) -> tuple[int, bytes]:
    """Exit code of a process and all it said; asked to stop, it gets SIGTERM, on which d2 saves and ends."""
    group = {"process_group": 0} if os.name == "posix" else {}  # Ctrl-C reaches this process alone, which passes it on
    asked = False
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, **group) as child:
        try:
            while True:
                try:
                    said, _ = child.communicate(timeout=POLL)
                    return child.returncode, said
                except subprocess.TimeoutExpired:
                    if stopping() and not asked:
                        asked = True
                        child.terminate()
        except BaseException:  # Ray cancels a task by an exception in it
            child.terminate()
            raise


def basis(job: Job, settings: Settings) -> str:
    """A digest of everything that decides the result: the input as it lies there, and the words but for the device."""
    shared = asdict(settings) | {"out": "", "overwrite": False, "retries": 0, "threads": 0}
    entries = [job.source, *sorted(job.source.iterdir())] if job.source.is_dir() else [job.source]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in entries if not path.is_dir()]
    text = json.dumps([str(job.source), job.kind, job.options, shared, stats], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _reason(code: int, said: bytes) -> str:
    """The line a process ended with, else what its exit code means."""
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
    lines = said.decode(errors="replace").splitlines()
    words = next((line for line in reversed(lines) if line.startswith(("error: ", "internal error: "))), "")
    return words.removeprefix("error: ") or f"exit code {code}; see the log"


def _record(job: Job, settings: Settings, code: int, error: str, seconds: float, attempts: int) -> Record:
    home = settings.out / job.name
    stage = (Run.open(home).stage(STAGE) if not code and is_run(home) else None) or {}
    return Record(
        job.name, str(job.source), basis(job, settings), code, error, round(seconds, 2), attempts,
        socket.gethostname(), stage.get("psnr"), stage.get("gaussians"),
    )  # fmt: skip
