"""Where sampling stands, on disk: everything a killed run needs to go on bit by bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from d2 import fileio
from d2.errors import InputError
from d2.sampler import State


class Snapshot(NamedTuple):
    """A state of one phase's loop, and what it depends on."""

    phase: str
    iteration: int  # of FreeInit
    state: State
    basis: str  # digest of configuration and references: another basis, another result


def save(path: str | Path, snapshot: Snapshot) -> None:
    """Writes it whole or not at all."""
    state = snapshot.state
    tensors = {"x": state.x} | ({} if state.previous is None else {"previous": state.previous})
    metadata = {
        "phase": snapshot.phase,
        "iteration": str(snapshot.iteration),
        "step": str(state.step),
        "again": str(state.again),
        "basis": snapshot.basis,
        "sha256": _digest(tensors),
    }
    fileio.write_tensors(path, tensors, metadata)


def load(path: str | Path) -> Snapshot:
    """Raises InputError for a damaged file: a single changed bit is noticed."""
    tensors, metadata = fileio.read_tensors(path)
    try:
        if metadata["sha256"] != _digest(tensors):
            raise ValueError("its checksum does not match")
        state = State(tensors["x"], int(metadata["step"]), int(metadata["again"]), tensors.get("previous"))
        return Snapshot(metadata["phase"], int(metadata["iteration"]), state, metadata["basis"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{fileio.quoted(path)} is not a state of d2 generate: {str(error)[:200]}") from error


def _digest(tensors: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()
