"""What composing two models gains over either: the README's second table, a plot of it and sheets to look at.

    python benchmarks/composition.py --work FOLDER [--toys 32] [--few 8] [--processes 2]

Goes on from what FOLDER holds.  Writes benchmarks/results/composition.json (mean and half the 95 % interval of every
measure by mode and variant), composition.png (the plot) and composition_toys.png (samples beside the truth).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image, ImageDraw

from d2 import config as configuration
from d2 import fileio
from d2.cli import report
from d2.recon import composition
from d2.run import Run
from d2.settings import GenerateConfig

RESULTS = Path(__file__).parent / "results"
PANELS = {  # measure: title
    "psnr": "PSNR to the truth, dB (higher is better)",
    "fit psnr": "PSNR to one 4D object fitted to it, dB (higher is better)",
    "flicker": "flicker where nothing moves (lower is better)",
    "motion": "share of the true motion (1 is right)",
    "error of the view model": "implausible to the view model (lower is better)",
    "error of the frame model": "implausible to the frame model (lower is better)",
}
ROW, LABEL, PANEL, HEAD = 15, 120, 250, 22  # pixels
INK, MARK, QUIET = (40, 44, 52), (46, 111, 235), (214, 218, 226)
SHEET_TOYS, SHEET_VARIANTS = (0, 1, 2), ("composed", "view only", "frame only")
SHEET_CELLS = ((-1, 0), (-1, 4), (1, 0), (1, 4), (3, 4), (5, 4))  # (view, frame): front, right, back, left
CELL = 64
WORK = typer.Option(..., help="Where the samples stay; goes on from there.")


def main(work: Path = WORK, toys: int = 32, few: int = 8, processes: int = 2, weights: Path | None = None) -> None:
    with report.observer(False) as observer:
        result = composition.composition(toys, few, weights=weights, work=work, processes=processes, observer=observer)
    print(composition.as_text(result))
    rows = result.pop("rows")
    modes: dict[str, dict[str, Any]] = {}
    for row in rows:
        modes.setdefault(row["mode"], {})[row["variant"].replace(" ", "_")] = {
            key.replace(" ", "_"): value for key, value in row.items() if key not in ("mode", "variant")
        }
    fileio.write_json(RESULTS / "composition.json", result | {"modes": modes})
    few_rows = [row for row in rows if row["mode"] == "image"]
    save(plot(few_rows), RESULTS / "composition.png")
    save(sheet(work), RESULTS / "composition_toys.png")


def plot(rows: list[dict[str, Any]]) -> Image.Image:
    """One panel a measure, one line a variant: mean and 95 % interval."""
    height = HEAD + ROW * len(rows) + 12
    canvas = Image.new("RGB", (2 * (LABEL + PANEL + 20), 3 * height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (name, title) in enumerate(PANELS.items()):
        left, top = index % 2 * (LABEL + PANEL + 20), index // 2 * height
        shown = [(row["variant"], *row[name]) for row in rows if name in row]
        low = min(mean - half for _, mean, half in shown)
        high = max(mean + half for _, mean, half in shown)
        scale = (PANEL - 60) / max(high - low, 1e-9)
        draw.text((left + 8, top + 6), title, INK)
        for line, (variant, mean, half) in enumerate(shown):
            y = top + HEAD + ROW * line + ROW // 2
            x = left + LABEL + (mean - low) * scale
            draw.line((left + LABEL, y, left + LABEL + PANEL - 60, y), QUIET)
            draw.line((x - half * scale, y, x + half * scale, y), MARK, 3)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), MARK)
            draw.text((left + 8, y - 6), variant, INK)
            draw.text((left + LABEL + PANEL - 52, y - 6), f"{mean:.3g}", INK)
    return canvas


def sheet(work: Path) -> Image.Image:
    """Toys (rows) by the truth and each variant (columns of six cells: front twice, right twice, back, left)."""
    block = CELL * len(SHEET_CELLS)
    canvas = Image.new("RGB", ((block + 8) * (1 + len(SHEET_VARIANTS)), (CELL + 4) * len(SHEET_TOYS) + HEAD), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(("truth", *SHEET_VARIANTS)):
        draw.text((column * (block + 8) + 4, 6), name, INK)
    for line, toy in enumerate(SHEET_TOYS):
        folder = work / f"toy{toy:03d}"
        matrices = [true_cells(toy)] + [sampled_cells(folder, variant) for variant in SHEET_VARIANTS]
        for column, cells in enumerate(matrices):
            for place, (v, f) in enumerate(SHEET_CELLS):
                corner = (column * (block + 8) + place * CELL, HEAD + line * (CELL + 4))
                canvas.paste(Image.fromarray(cells[v, f]), corner)
    return canvas


def sampled_cells(folder: Path, variant: str) -> np.ndarray:  # [V, F, H, W, 3]
    matrix = Run.open(folder / f"image-{variant.replace(' ', '-')}").matrix()
    cells = matrix.tensor(list(range(matrix.views)), list(range(matrix.frames)))
    return (cells.movedim(2, -1).numpy() * 255).round().astype(np.uint8)


def true_cells(toy: int) -> np.ndarray:  # [V, F, H, W, 3]
    settings = configuration.load(GenerateConfig, configuration.preset_path("tiny", "generate"))
    truth = composition.toy_matrix(toy, settings)
    return (np.moveaxis(truth[:, :, :3], 2, -1) * 255).round().astype(np.uint8)


def save(picture: Image.Image, target: Path) -> None:
    buffer = io.BytesIO()
    picture.quantize(128).save(buffer, "PNG", optimize=True)
    fileio.atomic_write(target, buffer.getvalue())


if __name__ == "__main__":
    typer.run(main)
