"""A reconstruction of six steps: the whole path of a run in a blink."""

from __future__ import annotations

import signal
from pathlib import Path

from d2.recon import pipeline

TINY = ("iterations=6", "start_gaussians=60", "max_gaussians=80", "validate_every=2", "holdout=2")


def tiny_reconstruct(path: Path, out: Path, *sets: str, **options) -> pipeline.Reconstruction:
    """`reconstruct` with TINY and more settings, on the CPU."""
    return pipeline.reconstruct(path, out, sets=(*TINY, *sets), device="cpu", **options)


class StopAfter:
    """Asks for a stop by SIGTERM at the n-th look."""

    def __init__(self, steps: int):
        self.left = steps

    def __call__(self) -> int:
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else 0
