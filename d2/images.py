"""Decoding and encoding of images, size-capped; arrays are uint8 [H, W, 4] straight alpha."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d2 import fileio
from d2.errors import D2Error, InputError

T = TypeVar("T")

MAX_PIXELS = 64 * 1024 * 1024
MAX_FILE = 512 * fileio.MB
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow knows more, some of which start other programs


def read_rgba(path: str | Path) -> tuple[np.ndarray, bool]:
    """uint8 [H, W, 4] and whether the file itself has transparency. Raises InputError naming the file."""
    image = open_image(path)
    has_alpha = image.has_transparency_data
    if image.mode not in ("RGB", "RGBA") and not has_alpha:
        image = decoded(path, lambda: image.convert("RGB"))  # not every mode converts to RGBA at once
    return np.asarray(decoded(path, lambda: image.convert("RGBA"))), has_alpha


def open_image(path: str | Path) -> Image.Image:
    """A fully decoded 8-bit image, EXIF orientation applied, 16-bit scaled. Raises InputError."""
    image = opened(path)

    def load() -> Image.Image:
        image.load()
        return _eight_bit(ImageOps.exif_transpose(image))

    return decoded(path, load)


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height as stored, without decoding the pixels. Raises InputError naming the file."""
    return opened(path).size


def opened(path: str | Path) -> Image.Image:
    """An image whose pixels, or frames, are still to be decoded. Raises InputError."""
    data = fileio.read_bytes(path, MAX_FILE)
    image = decoded(path, lambda: Image.open(io.BytesIO(data), formats=FORMATS))
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{fileio.quoted(path)} is {image.width}×{image.height}, more than {MAX_PIXELS >> 20} MP")
    return image


def decoded(path: str | Path, decode: Callable[[], T]) -> T:
    """Calls a decoder, whose exceptions become InputError: damaged files make them raise every class there is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused, and of damaged notes beside pixels
            return decode()
    except (MemoryError, D2Error):
        raise
    except UnidentifiedImageError as error:  # whose text is the address of a buffer
        raise InputError(f"{fileio.quoted(path)} is not a readable image: none of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise InputError(f"{fileio.quoted(path)} is not a readable image: {str(error)[:200]}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow keeps it in 32 where the file leaves the depth open."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image, np.float64)
    deep = image.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray(np.clip(values / (257 if deep else 1), 0, 255).round().astype(np.uint8))


def png_bytes(array: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W], [H, W, 3] or [H, W, 4]; the same array gives the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Writes uint8 [H, W, 3 or 4] whole or not at all."""
    fileio.atomic_write(path, png_bytes(array))


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Rounds floats in 0..1 (clipped) to 0..255."""
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def resize_rgba(rgba: np.ndarray, width: int, height: int) -> np.ndarray:
    """Area-filtered float [h, w, 4] in 0..1, premultiplied, from uint8 straight RGBA.

    Filtering happens in premultiplied alpha: what is transparent has no colour to bleed.
    """
    premultiplied = rgba.astype(np.float32) / 255
    premultiplied[..., :3] *= premultiplied[..., 3:]
    if premultiplied.shape[:2] == (height, width):
        return premultiplied
    planes = [
        np.asarray(Image.fromarray(premultiplied[..., k]).resize((width, height), Image.Resampling.BOX))
        for k in range(4)
    ]
    return np.stack(planes, -1)
