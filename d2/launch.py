"""How a job's models are put to work: loaded as the settings say, and on how many ranks.

Ranks come from torchrun, or rank 0 starts them itself, as `python -m d2.launch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2 import config as configuration
from d2 import machine
from d2.denoiser import OwnDenoiser
from d2.errors import D2Error, InputError, SetupError
from d2.pair import Execution, Model, Pair, load_models
from d2.ranks import LeadingPair, serve
from d2.settings import GenerateConfig
from d2.shard import Group

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL = "127.0.0.1"


def of_torchrun() -> tuple[int, int]:
    """This process's rank and how many there are, where torchrun (or the like) started it; else 0 of 1.

    Raises InputError where its variables hold something else.
    """
    if not all(name in os.environ for name in TORCHRUN):
        return 0, 1
    rank, size = (os.environ[name] for name in TORCHRUN[:2])
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK={rank!r} of WORLD_SIZE={size!r}: no numbers that torchrun sets; unset both")
    return int(rank), int(size)


def helps() -> bool:
    """Whether torchrun started this process to help rank 0, which does the talking."""
    return of_torchrun()[0] > 0


def load(
    settings: GenerateConfig, weights: str | Path | None, device: str, denoisers: Mapping[Model, OwnDenoiser]
) -> Pair:
    """The models, looked at and not read yet, to run as the settings say. Raises InputError and SetupError."""
    place = _own_device(machine.choose_device(device))
    if settings.compile != "off" and place.type != "cuda":
        raise InputError(f"compile {settings.compile}: on a GPU only; leave it off")
    if settings.compile != "off" and settings.offload:
        raise InputError(f"compile {settings.compile}: a network that comes and goes (offload) is not compiled")
    return load_models(settings, weights, place, execution(settings, place), denoisers)


def execution(settings: GenerateConfig, device: torch.device) -> Execution:
    """How the networks run there."""
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Execution(
        automatic if settings.dtype == "auto" else getattr(torch, settings.dtype),
        settings.offload, settings.guidance_halves, settings.feed_forward_chunk, settings.channels_last,
        settings.compile,
    )  # fmt: skip


def _own_device(device: torch.device) -> torch.device:
    """Of several processes on a machine with GPUs each takes its own."""
    if device.type == "cuda" and device.index is None and of_torchrun()[1] > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def help_out(pair: Pair, settings: GenerateConfig) -> None:
    """What a rank other than 0 does; returns when rank 0 lets it go."""
    rank, size = of_torchrun()
    store = next(dist.rendezvous("env://", timeout=timedelta(seconds=settings.rank_timeout)))[0]
    with _deaf(), Group(store, rank, size, pair.device, settings.rank_timeout) as group:
        serve(pair, group)


@contextlib.contextmanager
def gathered(pair: Pair, settings: GenerateConfig, processes: int = 1) -> Iterator[Pair]:
    """The pair that rank 0 works with: the one given, or where there are more ranks one that shares out work.

    `processes` ranks are started here, each with a GPU of its own or, on the CPU, with its part of the threads;
    ranks of torchrun are met instead where it started this process.  Raises WorkerError when one is lost.
    """
    _, size = of_torchrun()
    if size == 1 and processes == 1:
        yield pair
        return
    if size > 1:
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=settings.rank_timeout)))[0]
        with Group(store, 0, size, pair.device, settings.rank_timeout) as group:
            yield from _led(LeadingPair(pair, group))
        return
    _require_devices(pair.device, processes)
    listening = socket.create_server((LOCAL, 0))  # whatever MASTER_ADDR says: these ranks are all here
    port = listening.getsockname()[1]
    store = dist.TCPStore(LOCAL, port, None, True, wait_for_workers=False, master_listen_fd=listening.detach())
    before = torch.get_num_threads()
    threads = before if pair.device.type == "cuda" else max(1, before // processes)
    torch.set_num_threads(threads)
    children = [_start(pair, settings, rank, processes, port, threads) for rank in range(1, processes)]

    def dead() -> int | None:
        return next((rank for rank, child in enumerate(children, 1) if child.poll() is not None), None)

    try:
        with Group(store, 0, processes, _place(pair.device, 0), settings.rank_timeout, dead) as group:
            yield from _led(LeadingPair(pair, group))
            for child in children:
                child.wait(timeout=settings.rank_timeout)
    finally:
        torch.set_num_threads(before)
        for child in children:
            child.kill()
            child.wait()


def _led(pair: LeadingPair) -> Iterator[Pair]:
    """Lets the others go at the end, where they listen."""
    try:
        yield pair
    finally:
        if not pair.busy and not pair.group.lost:
            pair.group.closing = True
            pair.group.broadcast({"do": "stop"})


def _start(
    pair: Pair, settings: GenerateConfig, rank: int, size: int, port: int, threads: int
) -> subprocess.Popen[bytes]:
    """A rank of this machine, which needs no more than what is written here."""
    order = {
        "settings": configuration.resolved(settings), "paths": {name: str(path) for name, path in pair.paths.items()},
        "device": str(_place(pair.device, rank)), "rank": rank, "size": size, "port": port, "threads": threads,
        "execution": dataclasses.asdict(pair.execution) | {"dtype": str(pair.execution.dtype).split(".")[1]},
    }  # fmt: skip
    child = subprocess.Popen([sys.executable, "-m", "d2.launch"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert child.stdin is not None
    child.stdin.write(json.dumps(order).encode())
    child.stdin.close()
    return child


def _place(device: torch.device, rank: int) -> torch.device:
    return torch.device("cuda", (device.index or 0) + rank) if device.type == "cuda" else device


def _require_devices(device: torch.device, processes: int) -> None:
    if device.type != "cuda":
        return
    there = torch.cuda.device_count() - (device.index or 0)
    if there < processes:
        raise SetupError(f"--gpus {processes}: torch sees {there}; ask for fewer, or use --device cpu")


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Rank 0 decides when to stop; a Ctrl-C reaches every process of a terminal, torchrun's SIGTERM every rank."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """A rank that rank 0 started, its order on stdin."""
    order = json.load(sys.stdin)
    settings = configuration.load(GenerateConfig, order["settings"])
    torch.set_num_threads(order["threads"])
    execution = Execution(**(order["execution"] | {"dtype": getattr(torch, order["execution"]["dtype"])}))
    specs: dict[Model, Any] = {"view": settings.spec("view"), "frame": settings.spec("frame")}
    paths = {name: Path(path) for name, path in order["paths"].items()}
    pair = Pair(settings, specs, paths, torch.device(order["device"]), execution)
    store = dist.TCPStore(LOCAL, order["port"], None, False, timedelta(seconds=settings.rank_timeout))
    try:
        with _deaf(), Group(store, order["rank"], order["size"], pair.device, settings.rank_timeout) as group:
            serve(pair, group)
    except D2Error as error:  # rank 0 says why, or is gone
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
