"""metrics.jsonl of a reconstruction, read back: the quality on held-out pictures over the iterations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2 import fileio

NAME = "metrics.jsonl"
MAX_FILE = 64 * fileio.MB


def records(folder: Path) -> list[dict[str, Any]]:
    """Every whole line, oldest first; a torn last line is left out, and without the file there are none."""
    path = folder / NAME
    if not path.is_file():
        return []
    found = []
    for line in fileio.read_bytes(path, MAX_FILE).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            found.append(record)
    return found


def curve(folder: Path) -> list[list[float]]:
    """[iteration, dB] of every validation."""
    return [
        [record["iteration"], record["psnr_heldout"]]
        for record in records(folder)
        if isinstance(record.get("psnr_heldout"), int | float)
    ]
