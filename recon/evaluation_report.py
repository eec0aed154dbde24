"""What `d2 bench evaluate` shows: a table, plots of PSNR over time, views and elevations, the worst pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from d2 import fileio, images

TITLES = {
    "psnr": "PSNR, dB", "psnr_foreground": "PSNR of the foreground, dB", "psnr_worst": "PSNR of the worst picture, dB",
    "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS (lower is better)", "clip_i": "CLIP-I",
    "flicker": "flicker where nothing moves (0 is right)", "motion": "share of the motion (1 is right)",
    "fvd_frames": "FVD, videos of views", "fvd_views": "FVD, orbits of moments", "fvd_diagonal": "FVD, diagonals",
    "fvd_4d": "FVD, whole matrix", "cross_view_error": "error between neighbouring views (0 is right)",
    "cross_view_gaps": "surface seen from one side only (0 is right)",
    "chamfer_percent": "Chamfer distance, % of the diagonal", "f_score": "F-score at 1 %", "gaussians": "Gaussians",
}  # fmt: skip
WORST_SHOWN = 4
GAIN = 4  # of differences on the sheet
INK, QUIET = (40, 44, 52), (214, 218, 226)
PALETTE = ((46, 111, 235), (222, 110, 40), (40, 150, 90), (160, 70, 190), (200, 50, 90), (90, 90, 90))
PANEL, HEIGHT, LEFT, TOP, BOTTOM = 360, 200, 46, 26, 30  # pixels of a plot and its margins
STRIP = 16  # pixels of a label under a picture


class Picture(NamedTuple):
    """One picture of the truth and a model's render of it."""

    name: str
    time: float
    view: int
    elevation_deg: float
    psnr: float  # dB
    truth: np.ndarray  # [H, W, 3] uint8
    render: np.ndarray  # [H, W, 3] uint8


def as_text(result: dict[str, Any]) -> str:
    """The table for people; ± is the standard deviation over the models."""
    width, height = result["size"]
    lines = [f"{result['truth']}: {result['pictures']} pictures of {width}×{height} ({result['split']})"]
    several = len(result["models"]) > 1
    if several:
        lines += [f"  {row['model']}: {row['psnr']:.2f} dB" for row in result["models"]]
    spread = result.get("std", {})
    for key, title in TITLES.items():
        if key in result["mean"]:
            value = f"{result['mean'][key]:.6g}" + (f" ± {spread[key]:.3g}" if several else "")
            source = f" ({result['over_time_on']})" if key in ("flicker", "motion") or key.startswith("fvd") else ""
            lines.append(f"{title + source:<58}{value}")
    for k, band in enumerate(result["models"][0]["psnr_by_elevation"]):
        mean = statistics.fmean(row["psnr_by_elevation"][k]["psnr"] for row in result["models"])
        title = f"PSNR at elevations of {band['from_deg']}° to {band['to_deg']}° ({band['pictures']} pictures), dB"
        lines.append(f"{title:<58}{mean:.2f}")
    lines += [f"without {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines)


def write(folder: Path, result: dict[str, Any], pictures: Sequence[Sequence[Picture]]) -> None:
    """results.json (with every picture's PSNR), plots.png and worst.png; `pictures` [models][pictures]."""
    names = [row["model"] for row in result["models"]]
    fields = ("name", "time", "view", "elevation_deg", "psnr")
    detail = [[{key: getattr(p, key) for key in fields} for p in of_model] for of_model in pictures]
    fileio.write_json(folder / "results.json", result | {"pictures_by_model": detail})
    images.write_png(folder / "plots.png", np.asarray(plots(names, pictures)))
    images.write_png(folder / "worst.png", worst_sheet([p for of_model in pictures for p in of_model]))


def worst_sheet(pictures: Iterable[Picture]) -> np.ndarray:  # [H, W, 3] uint8
    """The worst pictures from left to right: truth above, render in the middle, difference ×4 below."""
    columns = []
    for p in sorted(pictures, key=lambda p: p.psnr)[:WORST_SHOWN]:
        difference = np.abs(p.truth.astype(np.int16) - p.render)
        rows = [p.truth, p.render, (255 - (GAIN * difference).clip(0, 255)).astype(np.uint8)]
        label = Image.new("RGB", (p.truth.shape[1], STRIP), "white")
        ImageDraw.Draw(label).text((3, 2), f"{p.psnr:.1f} dB  t {p.time:.2f}  {p.elevation_deg:.0f}°", INK)
        columns.append(np.concatenate([*rows, np.asarray(label)]))
    return np.concatenate(columns, 1)


def plots(names: Sequence[str], pictures: Sequence[Sequence[Picture]]) -> Image.Image:
    """PSNR over time, by view and by elevation: the mean of the pictures at each place, a line a model."""
    places = {
        "PSNR (dB) over time": lambda p: p.time,
        "PSNR (dB) by view": lambda p: p.view,
        "PSNR (dB) by elevation (degrees)": lambda p: round(p.elevation_deg),
    }
    legend = STRIP * len(names) + 8 if len(names) > 1 else 0
    canvas = Image.new("RGB", (PANEL * len(places), HEIGHT + legend), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, place) in enumerate(places.items()):
        _panel(draw, PANEL * k, title, [_means(of_model, place) for of_model in pictures])
    for k, name in enumerate(names if legend else ()):
        draw.text((LEFT, HEIGHT + STRIP * k), name[-100:], PALETTE[k % len(PALETTE)])
    return canvas


def _means(pictures: Sequence[Picture], place) -> list[tuple[float, float]]:
    """(place, mean PSNR) in the order of places."""
    groups: dict[float, list[float]] = {}
    for p in pictures:
        groups.setdefault(place(p), []).append(p.psnr)
    return [(where, statistics.fmean(found)) for where, found in sorted(groups.items())]


def _panel(draw: ImageDraw.ImageDraw, left: int, title: str, curves: list[list[tuple[float, float]]]) -> None:
    xs, ys = ([point[axis] for curve in curves for point in curve] for axis in (0, 1))
    low, high = min(ys), max(ys)
    low, high = (low, high) if high - low > 0.1 else (low - 0.5, high + 0.5)
    begin, end = min(xs), max(max(xs), min(xs) + 1e-9)
    width, height = PANEL - LEFT - 14, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return left + LEFT + (x - begin) / (end - begin) * width, TOP + (high - y) / (high - low) * height

    draw.text((left + LEFT, 6), title, INK)
    for value in np.linspace(low, high, 5):
        draw.line((*at(begin, value), *at(end, value)), QUIET)
        draw.text((left + 8, at(begin, value)[1] - 6), f"{value:.1f}", INK)
    for x, anchor in ((begin, "la"), (max(xs), "ra")):
        draw.text((at(x, low)[0], HEIGHT - BOTTOM + 8), f"{x:g}", INK, anchor=anchor)
    for k, curve in enumerate(curves):
        color = PALETTE[k % len(PALETTE)]
        draw.line([at(*point) for point in curve], color, 2)
        for x, y in (at(*point) for point in curve):
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)
