"""Encoding of video through ffmpeg: H.264, VP9, ProRes, GIF and WebP, each file whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from d2 import fileio
from d2.errors import InputError, ResourceError, SetupError

INSTALL = "pip install 'imageio[ffmpeg]'"
# Converted and tagged so: else colours depend on what a player guesses.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"


@dataclass(frozen=True)
class Codec:
    """How one kind of file is encoded."""

    suffix: str
    encoder: str  # as ffmpeg calls it
    opaque: str  # ffmpeg's pixel format without alpha
    alpha: str | None  # and with it; None: the file holds none
    options: tuple[str, ...]
    filters: str = _BT709
    even: bool = False  # sides must be even: halved chroma
    max_fps: float = 1000.0
    deep: bool = False  # takes 16 bits a channel


# A palette of its own for every frame; transparency is all or nothing.
_PALETTE = (
    "split[a][b];[a]palettegen=stats_mode=single:reserve_transparent=1[p];[b][p]paletteuse=new=1:alpha_threshold=128"
)
CODECS = {
    "mp4": Codec(
        ".mp4", "libx264", "yuv420p", None, ("-crf", "18", "-movflags", "+faststart"), even=True
    ),
    "webm": Codec(
        ".webm", "libvpx-vp9", "yuv420p", "yuva420p",
        ("-crf", "24", "-b:v", "0", "-row-mt", "1", "-cpu-used", "3"), even=True,
    ),
    "prores": Codec(
        ".mov", "prores_ks", "yuv444p10le", "yuva444p10le",
        ("-profile:v", "4444", "-vendor", "apl0"), deep=True,
    ),
    "gif": Codec(".gif", "gif", "pal8", "pal8", ("-loop", "0"), _PALETTE, max_fps=50.0),  # browsers slow down beyond
    "webp": Codec(".webp", "libwebp_anim", "bgra", "bgra", ("-quality", "85", "-loop", "0"), "null"),
}  # fmt: skip


def write(path: str | Path, frames: Iterable[np.ndarray], fps: float, format: str = "mp4") -> None:
    """Encodes uint8 [H, W, 3 or 4] frames of one size; the errors are those of `writer`."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ResourceError(f"cannot write {fileio.quoted(path)}: there are no frames")
    with writer(path, first.shape[1], first.shape[0], fps, CODECS[format], first.shape[2] == 4) as send:
        send(first)
        for frame in frames:
            send(frame)


@contextlib.contextmanager
def writer(
    path: str | Path, width: int, height: int, fps: float, codec: Codec, alpha: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields what takes one frame after the other: uint8 or uint16 [height, width, 3], or 4 with straight alpha.

    The file gets its name when all went well.  Where a codec halves the chroma, odd sides grow by a repeated row
    or column, see `encoded_size`.  Raises SetupError without ffmpeg or its encoder, InputError for a rate that the
    format cannot hold, ResourceError when ffmpeg fails, with its last words.
    """
    require(codec)
    if fps > codec.max_fps:
        raise InputError(f"{codec.suffix[1:]} plays at most {codec.max_fps:g} frames a second, got {fps:g}")
    grown = encoded_size(width, height, codec)
    with fileio.atomic_path(path) as temporary, tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C is for us, and we end it.
        process = subprocess.Popen(
            _command(temporary, grown, fps, codec, alpha), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=said, start_new_session=True,
        )  # fmt: skip
        pipe = process.stdin
        assert pipe is not None

        def send(frame: np.ndarray) -> None:
            padding = ((0, grown[1] - height), (0, grown[0] - width), (0, 0))
            with contextlib.suppress(BrokenPipeError):  # it died: its exit code tells
                pipe.write(np.pad(_as_deep_as(codec, frame), padding, mode="edge").tobytes())

        try:
            yield send
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
            if process.wait():
                said.seek(0)
                words = said.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
                raise ResourceError(f"cannot write {fileio.quoted(path)}: ffmpeg: {words[-1]}")
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def encoded_size(width: int, height: int, codec: Codec) -> tuple[int, int]:
    """Width and height as they stand in the file."""
    return (width + width % 2, height + height % 2) if codec.even else (width, height)


def require(codec: Codec) -> None:
    """Raises SetupError unless there is an ffmpeg with this encoder."""
    if codec.encoder not in _encoders(_program()):
        raise SetupError(f"this ffmpeg has no encoder {codec.encoder}; unset IMAGEIO_FFMPEG_EXE and run: {INSTALL}")


def _program() -> str:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise SetupError(f"no ffmpeg for video; run: {INSTALL}") from error


@functools.cache
def _encoders(program: str) -> frozenset[str]:
    try:
        done = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"ffmpeg does not run: {error}; run: {INSTALL}") from error
    return frozenset(line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 1)


def _as_deep_as(codec: Codec, frame: np.ndarray) -> np.ndarray:
    """The frame in as many bits as the encoder is given."""
    if codec.deep:
        return frame if frame.dtype == np.uint16 else frame.astype(np.uint16) * 257
    return (frame // 257).astype(np.uint8) if frame.dtype == np.uint16 else frame


def _command(target: Path, size: tuple[int, int], fps: float, codec: Codec, alpha: bool) -> list[str]:
    given = {(False, False): "rgb24", (True, False): "rgba", (False, True): "rgb48le", (True, True): "rgba64le"}
    made = codec.alpha if alpha and codec.alpha else codec.opaque
    return [
        _program(), "-v", "error", "-y",
        "-f", "rawvideo", "-pix_fmt", given[alpha, codec.deep], "-s", f"{size[0]}x{size[1]}",
        "-r", str(Fraction(fps).limit_denominator(1001)), "-i", "-",
        "-vf", codec.filters, "-c:v", codec.encoder, "-pix_fmt", made, *codec.options, str(target),
    ]  # fmt: skip
