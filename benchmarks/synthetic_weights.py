"""Writes files that have the layout of the official checkpoints, all zeros, sparse on disk.

    python benchmarks/synthetic_weights.py DIR [--dtype F32|F16|BF16]

They are for checking and timing the loader at full size without the weights themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from d2.fileio import atomic_path
from d2.models.weights import DTYPES, SV3D, SVD, layout, leftovers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes sparse files with the official checkpoints' layout.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--dtype", choices=list(DTYPES), default="F32")
    args = parser.parse_args(argv)
    for spec in (SVD, SV3D):
        path = args.folder / spec.filename
        size = write_sparse(path, layout(spec) | leftovers(spec), args.dtype)
        print(json.dumps({"file": str(path), "bytes": size}))
    return 0


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """A safetensors file of zeros that takes hardly any room; returns its length in bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
