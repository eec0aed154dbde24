"""Draws tests/data/toy.png: a toy of the test split, seen from the front, for the demo and the tests.

python benchmarks/make_toy.py [--index 29] [--out tests/data/toy.png]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from d2 import images, toybox

SIZE = 256  # pixels
ELEVATION = math.radians(10)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's toy.")
    parser.add_argument("--index", type=int, default=29, help="which toy of the test split")
    parser.add_argument("--out", type=Path, default=Path("tests/data/toy.png"))
    args = parser.parse_args()
    picture = toybox.render(toybox.sample_toy("test", args.index), 0.0, 0.0, ELEVATION, SIZE, samples=3)
    images.write_png(args.out, toybox.straight_rgba(picture)[0])


if __name__ == "__main__":
    main()
