"""Where tests run: the repository, and the environment of processes they start."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cli_environment() -> dict[str, str]:
    """One thread, so that results are the same on every machine; no colours, so that texts can be searched."""
    return os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
