"""Which lines of the matrix a rank denoises, and how ranks talk: cells are exchanged, a lost rank is noticed.

Rank 0 leads: it holds the state, tells the others what to do and gathers what they found.  Everybody says every
second that it is alive, so that a rank which died, hangs or is stopped ends the work in bounded time, however
long an evaluation takes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2.errors import D2Error, WorkerError

BEAT = 1.0  # seconds between two signs of life
POLL = 0.001  # seconds between two looks at an operation that runs
GRACE = 20.0  # seconds in which the main thread has to notice a loss
JOIN = 300.0  # seconds until all ranks have to be there
FOREVER = timedelta(days=30)  # for the library's own clocks: ours decide


def share(
    costs: Sequence[float],
    ranks: int,
) -> list[list[int]]:
    """Which pieces of work each rank does, ascending: the dearest first, each to whoever has least so far."""
    given: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        rank = loads.index(min(loads))
        given[rank].append(piece)
        loads[rank] += costs[piece]
    return [sorted(pieces) for pieces in given]


class Group(AbstractContextManager):
    """One rank's end of the connection to all the others; raises WorkerError where one of them is lost."""

    def __init__(
        self,
        store: dist.Store,  # that all ranks share
        rank: int,
        size: int,
        device: torch.device,  # where cells are sent from and received: NCCL on a GPU, gloo elsewhere
        patience: float = 60.0,  # seconds without a sign of life after which a rank is lost
        dead: Callable[[], int | None] = lambda: None,  # a rank that is known to have ended
        join: float = JOIN,
    ) -> None:
        self.store, self.rank, self.size, self.device = store, rank, size, device
        self.patience, self.dead = patience, dead
        self.lost: D2Error | None = None
        self.closing = False  # from now on ranks may end
        self.moved = 0  # bytes of cells that left or reached this rank
        self._over = threading.Event()
        self._calling = False  # whether the main thread is inside the library
        self._assemble(join)
        self.gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, FOREVER)
        self.cells = self.gloo
        if device.type == "cuda":
            torch.cuda.set_device(device)
            nccl: Any = dist.ProcessGroupNCCL
            self.cells = nccl(dist.PrefixStore("nccl", store), rank, size, FOREVER)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._watcher.join()

    def broadcast(self, message: Any = None) -> Any:
        """Rank 0's message, plain data, to everybody."""
        data = json.dumps(message).encode()
        length = torch.tensor([len(data)])
        self._wait(lambda: self.gloo.broadcast(length, 0))
        content = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._wait(lambda: self.gloo.broadcast(content, 0))
        return json.loads(content.numpy().tobytes())

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Rank 0's, into one of the same shape and type on the CPU."""
        tensor = tensor.contiguous()
        self._wait(lambda: self.gloo.broadcast(tensor.view(-1).view(torch.uint8), 0))
        return tensor

    def scatter(
        self,
        parts: list[Tensor],  # [n_r] float32 for each rank; ignored on all but rank 0
        expected: int,  # numbers for this rank
    ) -> Tensor:  # [expected], on the device
        """Each rank gets its part from rank 0."""
        outgoing = [len(part) for part in parts] if self.rank == 0 else [0] * self.size
        source = torch.cat(parts) if self.rank == 0 else torch.empty(0)
        return self._exchange(source, outgoing, [expected, *[0] * (self.size - 1)])

    def gather(
        self,
        part: Tensor,  # [n] float32
        expected: list[int],  # numbers from each rank; ignored on all but rank 0
    ) -> list[Tensor]:  # [n_r] for each rank, on the device; empty on all but rank 0
        """Rank 0 gets everybody's part."""
        incoming = expected if self.rank == 0 else [0] * self.size
        found = self._exchange(part, [len(part), *[0] * (self.size - 1)], incoming)
        return list(found.split(expected)) if self.rank == 0 else []

    def _exchange(self, source: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        source = source.to(self.device).contiguous()
        target = torch.empty(sum(incoming), device=self.device)
        self.moved += 4 * (sum(outgoing) - outgoing[self.rank] + sum(incoming) - incoming[self.rank])
        self._wait(lambda: self.cells.alltoall_base(target, source, incoming, outgoing))
        return target

    def fail(self, error: D2Error) -> None:
        """Leaves word for rank 0 of why this rank ends."""
        self.store.set(f"error/{self.rank}", json.dumps([error.exit_code, str(error)]))

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        """Runs an operation to its end, or until a rank is lost."""
        self._calling = True
        try:
            work = start()
            while not work.is_completed():
                if self.lost:
                    raise self.lost
                time.sleep(POLL)
            work.wait()
        except RuntimeError as error:  # the other end of a connection is gone: who, and why, is known in a moment
            deadline = time.monotonic() + 3 * BEAT
            while not self.lost and time.monotonic() < deadline:
                time.sleep(POLL)
            raise self.lost or WorkerError(f"a rank was lost: {str(error)[:200]}") from error
        finally:
            self._calling = False

    def _assemble(self, join: float) -> None:
        """Waits until all ranks are there."""
        self.store.add("here", 1)
        deadline = time.monotonic() + join
        while (here := self.store.add("here", 0)) < self.size:
            self._look_for_ended()
            if self.lost:
                raise self.lost
            if time.monotonic() > deadline:
                raise WorkerError(f"only {here} of {self.size} ranks were there after {join:.0f} s")
            time.sleep(0.02)

    # -- watching --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        watched = range(1, self.size) if self.rank == 0 else range(1)
        now = time.monotonic()
        heard = dict.fromkeys(watched, (0, now))
        while not self.lost and not self._over.wait(BEAT):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                counts = {rank: self.store.add(f"beat/{rank}", 0) for rank in watched}
                self._look_for_ended()
            except RuntimeError:  # the store is rank 0's
                if self._over.is_set():
                    return
                self.lost = WorkerError("rank 0 is gone")
                break
            now = time.monotonic()
            heard = {rank: heard[rank] if heard[rank][0] == n else (n, now) for rank, n in counts.items()}
            for rank, (_, last) in heard.items():
                if now - last > self.patience:
                    self.lost = WorkerError(f"rank {rank} gave no sign of life for {self.patience:g} s")
        if self.lost and not self._over.wait(GRACE) and self._calling:
            # The library does not come back, so nobody else can end this process; the last saved state stands.
            print(f"error: {self.lost}", file=sys.stderr, flush=True)
            os._exit(WorkerError.exit_code)

    def _look_for_ended(self) -> None:
        if self.rank != 0 or self.lost or self.closing:
            return
        ended = self.dead()
        for rank in range(1, self.size):
            if self.store.check([f"error/{rank}"]):
                code, text = json.loads(self.store.get(f"error/{rank}"))
                kinds = {kind.exit_code: kind for kind in D2Error.__subclasses__()}
                self.lost = kinds.get(code, WorkerError)(f"rank {rank}: {text}")
                return
        if ended is not None:
            self.lost = WorkerError(f"rank {ended} ended")
