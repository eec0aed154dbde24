"""One run for each of several seeds, and one picture to choose by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2 import images
from d2.asset import Asset
from d2.errors import InputError
from d2.generation import Generation, generate
from d2.launch import helps
from d2.previews import VIDEO_CELL, tiled
from d2.run import Run

ACROSS = 8  # at most that many views of each seed
MOST = 1000  # seeds


def sweep(source: str | Path | Asset, out: str | Path, seeds: tuple[int, ...], **options: Any) -> list[Generation]:
    """Runs `generate` once a seed into out/seed-N, keeps what is finished, and writes out/seeds.png.

    The picture has a line for each seed: views around the object at the middle frame.  `options` are those of
    `generate`, whose errors it raises; InputError for no seed, or the same twice.
    """
    if not seeds or len(set(seeds)) < len(seeds) or len(seeds) > MOST:
        raise InputError(f"--seeds {','.join(map(str, seeds))}: expected different numbers, at most {MOST}")
    out = Path(out)
    sets = tuple(options.pop("sets", ()))
    keep = not options.get("overwrite", False)
    made = [
        generate(source, out / f"seed-{seed}", sets=(*sets, f"seed={seed}"), keep_finished=keep, **options)
        for seed in seeds
    ]
    if helps():
        return made
    images.write_png(out / "seeds.png", tiled(np.stack([_line(result) for result in made])))
    return made


def parse_seeds(text: str) -> tuple[int, ...]:
    """`1,2,3` -> (1, 2, 3); raises InputError."""
    parts = text.replace(" ", "").split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 for part in parts):
        raise InputError(f"--seeds {text!r}: expected numbers such as 1,2,3")
    return tuple(int(part) for part in parts)


def _line(result: Generation) -> np.ndarray:  # [n, VIDEO_CELL, VIDEO_CELL, 3] uint8
    matrix = Run.open(result.folder).matrix()
    count = min(ACROSS, result.views)
    views = [round((i + 1) * result.views / count) - 1 for i in range(count)]  # the last one is the input's
    pictures = [matrix.tensor([v], [result.frames // 2])[0, 0].permute(1, 2, 0).numpy() for v in views]
    return np.stack(
        [np.asarray(Image.fromarray(images.to_uint8(p)).resize((VIDEO_CELL, VIDEO_CELL))) for p in pictures]
    )
