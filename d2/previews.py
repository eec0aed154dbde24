"""Pictures of a matrix for the eye: contact sheet, preview video, latents as colours; and alpha from white."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from d2 import images, video
from d2.errors import SetupError

SHEET_CELL = 96  # pixels, side of a picture of the contact sheet
VIDEO_CELL = 192  # pixels, side of a view in the preview video
LATENT_CELL = 36  # pixels, side of a cell of the preview while sampling

# Colours of Stable Diffusion's four latent channels, red green blue each, in -1..1: what a linear fit to
# decoded pictures gives.  Good enough to see what is going on.
LATENT_RGB = np.array([[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]])

WHITE = 240, 253  # darkest and brightest level from which on a pixel may be background
NOISE = 10  # percent of the border that may be darker than the background's noise makes it
EDGE = 5  # pixels: the width of the neighbourhood in which an edge pixel finds its object's darkness


class Thumbnails:
    """Collects small pictures of every cell as it is drawn, then writes the sheet and the video."""

    def __init__(self, views: int, frames: int) -> None:
        self.cells = np.full((views, frames, VIDEO_CELL, VIDEO_CELL, 3), 255, np.uint8)

    def add(
        self,
        view: int,
        frame: int,
        rgb: np.ndarray,  # [H, W, 3] uint8
    ) -> None:
        self.cells[view, frame] = np.asarray(Image.fromarray(rgb).resize((VIDEO_CELL, VIDEO_CELL)))

    def write_sheet(self, path: str | Path) -> None:
        """Views from top to bottom, frames from left to right."""
        step = VIDEO_CELL // SHEET_CELL
        images.write_png(path, tiled(self.cells[:, :, ::step, ::step]))

    def write_video(self, path: str | Path, fps: float, notice: Callable[[str], None]) -> None:
        """All views side by side as time passes; without ffmpeg a warning and no video."""
        views, frames = self.cells.shape[:2]
        across = math.ceil(math.sqrt(views))
        down = math.ceil(views / across)
        blank = np.full((across * down - views, frames, VIDEO_CELL, VIDEO_CELL, 3), 255, np.uint8)
        grid = np.concatenate([self.cells, blank]).reshape(down, across, *self.cells.shape[1:])
        try:
            video.write(path, (tiled(grid[:, :, frame]) for frame in range(frames)), fps)
        except SetupError as error:
            notice(f"Warning: no preview.mp4: {error}")


def tiled(
    cells: np.ndarray,  # [rows, columns, h, w, 3]
) -> np.ndarray:  # [rows h, columns w, 3]
    """One picture of many."""
    rows, columns, h, w, c = cells.shape
    return np.ascontiguousarray(cells.transpose(0, 2, 1, 3, 4)).reshape(rows * h, columns * w, c)


def latent_sheet(
    latents: Tensor,  # [V, F, C, h, w], as sampled
    colours: np.ndarray = LATENT_RGB,  # [C, 3] of each channel, in -1..1
    origin: float = 0.0,  # the colour of latent 0, in -1..1
) -> np.ndarray:  # [V h', F w', 3] uint8
    """The matrix as it stands, without a decoder."""
    stride = max(1, latents.shape[-1] // LATENT_CELL)
    small = latents[..., ::stride, ::stride].float().cpu().numpy()
    return tiled(images.to_uint8((np.einsum("vfchw,cr->vfhwr", small, colours) + origin + 1) / 2))


def alpha_from_white(
    rgb: np.ndarray,  # [H, W, 3] uint8 over white
) -> np.ndarray:  # [H, W, 4] uint8, straight alpha
    """Alpha estimated against the known white background.

    Near-white pixels connected to the border are background; everything else is opaque but for the pixels
    beside it, whose alpha is their darkness over the greatest nearby: rgb = alpha·colour + (1 - alpha)·white.
    White parts of the object are kept where something darker encloses them.  How white the background is,
    the border of the picture says: the closer to white, the more of a pale object is kept.
    """
    level = rgb.min(-1)
    border = np.concatenate([level[0], level[-1], level[:, 0], level[:, -1]])
    outside = connected_to_border(level >= np.clip(np.percentile(border, NOISE) - 1, *WHITE))
    darkness = 255 - level
    around = np.asarray(Image.fromarray(darkness).filter(ImageFilter.MaxFilter(EDGE)), np.float32)
    near = np.asarray(Image.fromarray(outside.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0
    alpha = np.where(near, np.clip(darkness / np.maximum(around, 1), 0, 1), 1.0)
    alpha = np.where(outside, 0.0, alpha)[..., None]
    colour = np.where(alpha > 0, (rgb / 255 - (1 - alpha)) / np.maximum(alpha, 1 / 255), 0)
    return np.concatenate([images.to_uint8(colour), images.to_uint8(alpha)], -1)


def connected_to_border(
    mask: np.ndarray,  # [H, W] bool
) -> np.ndarray:  # [H, W] bool
    """The part of a mask that reaches the border through itself, sideways and up and down.

    Sweeps in the four directions, again until nothing changes: a few times for anything but a maze.
    """
    reached = np.zeros_like(mask)
    reached[[0, -1]], reached[:, [0, -1]] = mask[[0, -1]], mask[:, [0, -1]]
    before = -1
    while before != (before := int(reached.sum())):
        for lines, allowed in ((reached, mask), (reached[::-1], mask[::-1]), (reached.T, mask.T)):
            _sweep(lines, allowed)
        _sweep(reached.T[::-1], mask.T[::-1])
    return reached


def _sweep(
    reached: np.ndarray,  # [n, m] bool, changed in place
    mask: np.ndarray,  # [n, m] bool
) -> None:
    """Each line takes over what the one before reached."""
    for i in range(1, len(mask)):
        reached[i] |= reached[i - 1] & mask[i]
