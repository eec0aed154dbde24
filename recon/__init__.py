"""Stage 2: 4D Gaussians from multi-view video.  `reconstruct`, `export`, `render` and `evaluate` are all of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2.recon.evaluation import evaluate
    from d2.recon.exports import export
    from d2.recon.film import render
    from d2.recon.pipeline import reconstruct

# Idle OpenMP threads sleep instead of spinning: read when the runtime loads, so set before torch or numba does.
# With one other busy process on two cores a step took 25 ms spinning and 12 ms sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# numba's OpenMP layer first: beside Open3D, which brings an old TBB, numba warns when it looks at TBB first.
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")

__all__ = ["evaluate", "export", "reconstruct", "render"]
_HOME = {
    "evaluate": "d2.recon.evaluation", "export": "d2.recon.exports", "reconstruct": "d2.recon.pipeline",
    "render": "d2.recon.film",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports an entry point on first use, so that `import d2.recon` stays free of torch."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
