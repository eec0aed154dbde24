"""The animations of the README: a looping turntable of a reconstruction, from two heights, as one WebP file.

With --beside the input stands at the left, and the contact sheet goes into <target>_contact.webp.

d2 reconstruct tests/data/panda --out runs/picture --fps 12
python benchmarks/picture.py runs/picture benchmarks/results/panda.webp
make demo
python benchmarks/picture.py runs/toy benchmarks/results/toy.webp --beside tests/data/toy.png
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from d2 import fileio
from d2.recon import drawing, exports

SIZE = 320  # pixels of one picture
ELEVATIONS_DEG = (10.0, 35.0)  # of the two pictures side by side


def main(run: Path, target: Path, beside: Path | None = None) -> None:
    source = exports.find(run)
    times = drawing.loop_times(np.linspace(0, 1, source.frames), source.fps)
    framed = drawing.framing(source.gaussians)
    framed = framed._replace(
        radius=0.95 * framed.radius
    )  # of the sphere that holds the panda only its middle is filled
    clips: list[Iterable[np.ndarray]] = [
        drawing.turntable(source.gaussians, times, SIZE, SIZE, elevation=math.radians(e), framed=framed)
        for e in ELEVATIONS_DEG
    ]
    if beside is not None:  # the only input, still
        with Image.open(beside) as picture:
            still = Image.new("RGBA", picture.size, "white")
            still.alpha_composite(picture.convert("RGBA"))
        clips.insert(0, itertools.repeat(np.asarray(still.convert("RGB").resize((SIZE, SIZE)))))
    frames = [Image.fromarray(np.concatenate(pair, 1)) for pair in zip(*clips, strict=beside is None)]
    buffer = io.BytesIO()
    options = {"duration": round(1000 / source.fps), "loop": 0, "quality": 70, "method": 4}
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], **options)
    fileio.atomic_write(target, buffer.getvalue())
    if beside is not None and source.folder is not None:
        buffer = io.BytesIO()
        with Image.open(source.folder / "export" / "contact.png") as sheet:
            sheet.convert("RGB").save(buffer, "WEBP", quality=70)
        fileio.atomic_write(target.with_name(f"{target.stem}_contact.webp"), buffer.getvalue())


if __name__ == "__main__":
    typer.run(main)
