"""Decoding and encoding of images and videos, size-capped; arrays are uint8 [H, W, 4] straight alpha."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2 import fileio
from d2.errors import InputError, SetupError

MAX_PIXELS = 64 * 1024 * 1024
MAX_FILE = 512 * fileio.MB
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def read_rgba(path: str | Path) -> tuple[np.ndarray, bool]:
    """uint8 [H, W, 4] and whether the file itself has transparency. Raises InputError naming the file."""
    image = open_image(path)
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    return np.asarray(image.convert("RGBA")), has_alpha


def open_image(path: str | Path) -> Image.Image:
    """A fully decoded 8-bit image, EXIF orientation applied, 16-bit scaled. Raises InputError."""
    from PIL import ImageOps

    data = fileio.read_bytes(path, MAX_FILE)
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{fileio.quoted(path)} is {image.width}×{image.height}, more than {MAX_PIXELS >> 20} MP")
        image.load()
        image = ImageOps.exif_transpose(image)
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{fileio.quoted(path)} is not a readable image: {str(error)[:200]}") from error
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        image = Image.fromarray(np.clip(values / (257 if values.max() > 255 else 1), 0, 255).round().astype(np.uint8))
    return image


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


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """H.264, yuv420p, faststart, from uint8 [H, W, 3] frames (even sizes are padded to).

    Raises SetupError where no ffmpeg is to be had.
    """
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise SetupError("no ffmpeg for video; run: pip install 'imageio[ffmpeg]'") from error
    with fileio.atomic_path(path) as temporary:
        writer = None
        try:
            for frame in frames:
                if writer is None:
                    size = (frame.shape[1] + frame.shape[1] % 2, frame.shape[0] + frame.shape[0] % 2)
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary), size, fps=fps, codec="libx264", quality=None, macro_block_size=1,  # pyright: ignore[reportArgumentType]
                        ffmpeg_log_level="error", output_params=["-crf", "18", "-movflags", "+faststart"],
                    )  # fmt: skip
                    writer.send(None)
                writer.send(np.ascontiguousarray(_pad_even(frame)))
        finally:
            if writer is not None:
                writer.close()


def _pad_even(frame: np.ndarray) -> np.ndarray:
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
