"""From a picture with an alpha channel to a centred square on white, as the networks know it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2.errors import InputError


class Box(NamedTuple):
    """A rectangle in pixels; x to the right, y down."""

    x: int
    y: int
    width: int
    height: int


def foreground(image: Image.Image) -> Box:
    """The bounding box of every pixel of an RGBA picture that is not fully transparent.

    Raises InputError when there is none.
    """
    bounds = image.getchannel("A").getbbox()
    if bounds is None:
        raise InputError("the picture is fully transparent: no foreground")
    left, top, right, bottom = bounds
    return Box(left, top, right - left, bottom - top)


def whole(image: Image.Image) -> Box:
    """The box of the full picture."""
    return Box(0, 0, *image.size)


def union(boxes: list[Box]) -> Box:
    """The smallest box around all: one for a whole clip keeps the motion that a box for each would remove."""
    left, top = min(b.x for b in boxes), min(b.y for b in boxes)
    right, bottom = max(b.x + b.width for b in boxes), max(b.y + b.height for b in boxes)
    return Box(left, top, right - left, bottom - top)


def square_side(box: Box, ratio: float | None, image_height: int) -> int:
    """The side in pixels of the square whose `ratio` the box's longer side takes up.

    Without a ratio the square is as high as the picture, or as large as the box where that does not fit.
    """
    longer = max(box.width, box.height)
    return int(longer / ratio) if ratio is not None else max(image_height, longer)


def recentre(
    image: Image.Image,
    box: Box,
    side: int,  # pixels of the input
    size: int = 576,  # pixels of the output
) -> Image.Image:
    """The box of an RGBA picture in the middle of a transparent square, resized to size×size RGBA."""
    if side < max(box.width, box.height):
        raise InputError(f"a {box.width}x{box.height} foreground does not fit a square of {side} pixels")
    square = Image.new("RGBA", (side, side))
    crop = image.crop((box.x, box.y, box.x + box.width, box.y + box.height))
    square.paste(crop, (side // 2 - box.width // 2, side // 2 - box.height // 2))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def on_white(
    image: Image.Image,  # RGBA
) -> np.ndarray:  # [H, W, 3] uint8
    """The picture over white; levels are cut off, not rounded, as in the reference."""
    rgba = np.asarray(image) / 255
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + (1 - alpha)) * 255).astype(np.uint8)


def to_tensor(
    picture: np.ndarray,  # [H, W, 3] uint8
) -> Tensor:  # [3, H, W] float32 in -1..1
    """What the networks take."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1) / 255 * 2 - 1


def squares(
    pictures: Sequence[Image.Image],  # RGBA
    ratio: float | None = 0.9,
    box: Literal["clip", "frame"] = "clip",
    size: int = 576,  # pixels of the output
) -> list[Image.Image]:  # RGBA, size×size
    """Pictures of one clip, centred and scaled alike.

    One box around the object in all of them keeps its motion; one for each frame, as in the reference, takes
    it away.  Without a ratio a clip keeps its whole picture.  Raises InputError when nothing is opaque.
    """
    if ratio is None and len(pictures) > 1:
        boxes = [whole(picture) for picture in pictures]
    else:
        boxes = [foreground(picture) for picture in pictures]
    if box == "clip":
        boxes = [union(boxes)] * len(boxes)
    return [
        recentre(picture, b, square_side(b, ratio, picture.height), size)
        for picture, b in zip(pictures, boxes, strict=True)
    ]


def frame_picture(
    image: Image.Image,  # RGBA
    ratio: float | None = 0.9,
    video: bool = False,
    size: int = 576,
) -> np.ndarray:  # [size, size, 3] uint8
    """One picture on its own: found, centred, resized, put on white.

    A video frame without a ratio keeps its whole picture, so that motion across it stays.
    Raises InputError when nothing is opaque, or when the ratio is not in (0, 1].
    """
    if ratio is not None and not (math.isfinite(ratio) and 0 < ratio <= 1):
        raise InputError(f"image frame ratio {ratio}: expected more than 0 and at most 1")
    box = whole(image) if video and ratio is None else foreground(image)
    return on_white(recentre(image, box, square_side(box, ratio, image.height), size))
