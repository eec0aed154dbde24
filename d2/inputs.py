"""What a user gives: an image, a folder of frames, a video; decoded, in order, with an alpha channel."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageSequence

from d2 import fileio, images
from d2.errors import InputError, SetupError
from d2.images import MAX_PIXELS, SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
MOVING_SUFFIXES = (".gif", ".webp", ".png")  # image formats that may hold more than one frame
PROBE_SECONDS = 60  # that ffmpeg may take to say what a file is
VIDEO_FRAMES = 4096  # at most that many are decoded
VIDEO_MEMORY = 4 << 30  # bytes of decoded frames
RembgModel = Literal["u2net", "u2netp", "isnet-general-use", "birefnet-general"]  # 176, 5, 179 and 973 MB
REMBG_SIDE = 768  # pixels; larger pictures are shrunk before their background is removed
LEAST_FOREGROUND = 16  # opaque pixels; fewer are dust, not an object
DIGITS = 64  # of a number in a name; what follows does not count

Pick = Literal["even", "first"]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Clip:
    """Pictures in playing order; one is a still."""

    pictures: tuple[Image.Image, ...]  # RGBA, all of one size
    names: tuple[str, ...]  # files, or "video.mp4#12"
    fps: float | None  # a video's own rate, after frames were picked
    opaque: bool  # whether the background is still there
    digest: str  # sha256 of every picture, in order

    def __len__(self) -> int:
        return len(self.pictures)


def read(source: str | Path, frames: int, pick: Pick = "even", notice: Notice = print, what: str = "frames") -> Clip:
    """Reads an image (any mode Pillow knows), a folder of images, a GIF or a video.

    A clip has exactly `frames` pictures: of more, `frames` evenly spaced ones or the first ones are taken and
    `notice` is told.  Raises InputError naming the file for what cannot be read, for too few frames, frames of
    several sizes and names in no clear order; SetupError where a video needs an absent ffmpeg.
    """
    source = Path(source)
    try:
        folder, exists = source.is_dir(), source.exists()
    except OSError as error:
        raise InputError(f"cannot read {fileio.quoted(source)}: {(error.strerror or str(error)).lower()}") from error
    if not exists:
        raise InputError(f"{fileio.quoted(source)} does not exist")
    if folder:
        return _read_folder(source, frames, pick, notice, what)
    if source.suffix.lower() in VIDEO_SUFFIXES:
        moving, fps = read_video(source)
    elif source.suffix.lower() in MOVING_SUFFIXES:
        moving, fps = _read_moving(source)
    else:
        moving, fps = [], None
    if len(moving) > 1:
        names = [f"{source.name}#{number}" for number in range(len(moving))]
        chosen = choose(len(moving), frames, pick, fileio.quoted(source), notice, what)
        if fps is not None and pick == "even":
            fps *= len(chosen) / len(moving)
        return clip_of([moving[i] for i in chosen], [names[i] for i in chosen], fps)
    return clip_of([images.open_image(source)], [source.name], None)


def natural_order(files: Iterable[Path], folder: Path) -> list[Path]:
    """By the numbers in the names, so that 2 comes before 10; names without any are sorted as text.

    Raises InputError where some names have a number and some have none: their order would be a guess.
    """
    ordered = sorted(files, key=lambda path: (_natural_key(path.stem), path.name))
    numbered = [path for path in ordered if re.search(r"\d", path.stem)]
    odd = [path for path in ordered if path not in numbered]
    if numbered and odd:
        raise InputError(
            f"{fileio.quoted(folder)}: {fileio.quoted(odd[0].name)} has no number and "
            f"{fileio.quoted(numbered[0].name)} has one, so the order of the frames is not clear; number them all"
        )
    return ordered


def choose(count: int, frames: int, pick: Pick, where: str, notice: Notice, what: str = "frames") -> list[int]:
    """Which of `count` pictures stand for `frames`. Raises InputError for too few."""
    if count < frames:
        raise InputError(f"{where}: expected {frames} {what}, got {count}; give more or pass --set {what}={count}")
    if count == frames:
        return list(range(count))
    if pick == "first":
        notice(f"Warning: {where} has {count} {what}; the first {frames} are used")
        return list(range(frames))
    notice(f"Warning: {where} has {count} {what}; {frames} evenly spaced ones are used")
    return [round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames)]


def read_video(path: str | Path) -> tuple[list[Image.Image], float | None]:
    """Every frame of a video and its rate. Raises InputError, or SetupError without ffmpeg."""
    path = Path(path)
    try:
        import imageio_ffmpeg

        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise SetupError("no ffmpeg to read videos; run: pip install 'imageio[ffmpeg]'") from error
    if not path.is_file():
        raise InputError(f"{fileio.quoted(path)} is not a regular file")
    # A playlist in a video's clothes must not make ffmpeg open anything but this file.
    command = [ffmpeg, "-nostdin", "-protocol_whitelist", "file,pipe", "-i", f"file:{path}"]
    try:
        about = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS).stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{fileio.quoted(path)} is not a readable video: ffmpeg does not finish") from error
    rate = re.search(r"Video: .* (\d+(?:\.\d+)?) fps", about)
    command += ["-v", "quiet", "-map", "0:v:0", "-f", "image2pipe", "-c:v", "ppm", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            frames = list(_pnm_frames(process.stdout, path))
        finally:
            process.kill()
    if not frames:
        reason = about.strip().splitlines()[-1][-200:] if about.strip() else "no frames"
        raise InputError(f"{fileio.quoted(path)} is not a readable video: {reason}")
    return frames, float(rate[1]) if rate and float(rate[1]) > 0 else None


def _pnm_frames(stream: IO[bytes], path: Path) -> Iterator[Image.Image]:
    """Frames of a stream of binary PPM pictures; each says its size before its pixels."""
    total = count = 0
    while stream.readline(8) == b"P6\n":
        width, height = (int(number) for number in stream.readline(32).split())
        stream.readline(8)  # the greatest value, 255
        count, total = count + 1, total + width * height * 3
        if width * height > MAX_PIXELS:
            raise InputError(f"{fileio.quoted(path)} is {width}×{height}, more than {MAX_PIXELS >> 20} MP")
        if count > VIDEO_FRAMES or total > VIDEO_MEMORY:
            raise InputError(f"{fileio.quoted(path)} has more than {count - 1} frames; cut it first")
        data = stream.read(width * height * 3)
        if len(data) < width * height * 3:
            return  # cut off within a frame
        yield Image.frombytes("RGB", (width, height), data)


def with_masks(clip: Clip, masks: str | Path) -> Clip:
    """The pictures with the alpha of a mask each (white is the object): one file, or a folder in the same order.

    Raises InputError for another number of masks or another size.
    """
    masks = Path(masks)
    files = natural_order(_images_in(masks, print), masks) if masks.is_dir() else [masks]
    if len(files) != len(clip):
        raise InputError(f"{fileio.quoted(masks)}: expected {len(clip)} masks, one for each picture, got {len(files)}")
    pictures = []
    for picture, name, file in zip(clip.pictures, clip.names, files, strict=True):
        mask = images.open_image(file).convert("L")
        if mask.size != picture.size:
            sizes = f"{mask.width}×{mask.height}, expected {picture.width}×{picture.height}"
            raise InputError(f"{fileio.quoted(file)} is {sizes} like {fileio.quoted(name)}")
        picture = picture.copy()
        picture.putalpha(mask)
        pictures.append(picture)
    return Clip(tuple(pictures), clip.names, clip.fps, False, _digest(pictures))


def without_background(clip: Clip, notice: Notice = print, model: RembgModel = "u2net") -> Clip:
    """The pictures with their background removed by rembg, as the reference does it (with u2net).

    Raises SetupError where rembg or its model is absent; nothing is downloaded.
    """
    if not any(path.is_file() for path in _rembg_models(model)):
        raise SetupError(
            f"the input has no alpha channel, and rembg's model {model}.onnx is not on this machine; get it once "
            f"with: python -c \"import rembg; rembg.new_session('{model}')\" -- or pass --mask DIR or --no-remove-bg"
        )
    notice("Removing the background with rembg; its first import compiles for about 100 s")
    from d2.machine import require

    rembg: Any = require("rembg")
    session = rembg.new_session(model)
    pictures = []
    for picture in clip.pictures:
        small = picture.copy()
        small.thumbnail((REMBG_SIDE, REMBG_SIDE), Image.Resampling.LANCZOS)
        pictures.append(rembg.remove(small, alpha_matting=True, session=session).convert("RGBA"))
    return Clip(tuple(pictures), clip.names, clip.fps, False, clip.digest)


def require_foreground(clip: Clip) -> None:
    """Raises InputError naming the first picture in which nothing is opaque."""
    for picture, name in zip(clip.pictures, clip.names, strict=True):
        seen = int(np.count_nonzero(np.asarray(picture.getchannel("A"))))
        if seen < LEAST_FOREGROUND:
            raise InputError(f"{fileio.quoted(name)} has no foreground: {seen} of its pixels are not transparent")


def _read_folder(folder: Path, frames: int, pick: Pick, notice: Notice, what: str) -> Clip:
    files = natural_order(_images_in(folder, notice), folder)
    if not files:
        accepted = ", ".join(SUFFIXES)
        raise InputError(f"{fileio.quoted(folder)} holds no images; accepted: {accepted}")
    files = [files[i] for i in choose(len(files), frames, pick, fileio.quoted(folder), notice, what)]
    return clip_of([images.open_image(file) for file in files], [file.name for file in files], None)


def _images_in(folder: Path, notice: Notice) -> list[Path]:
    """Regular files with an image's suffix; what only looks like one (a folder, a pipe) is skipped, aloud."""
    found = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {fileio.quoted(folder)}: {(error.strerror or str(error)).lower()}") from error
    for path in entries:
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            regular = path.is_file()
        except OSError:  # a loop of links
            regular = False
        if regular:
            found.append(path)
        else:
            notice(f"Warning: {fileio.quoted(path)} is not a regular file and is left out")
    return found


def _read_moving(path: Path) -> tuple[list[Image.Image], float | None]:
    """The frames of an animated image, none where it is a still (which has a reader of its own)."""
    image = images.opened(path)
    count = images.decoded(path, lambda: getattr(image, "n_frames", 1))
    if count < 2:
        return [], None
    if count > min(VIDEO_FRAMES, VIDEO_MEMORY // (image.width * image.height * 4)):
        raise InputError(f"{fileio.quoted(path)} has {count} frames, too many to decode; cut it first")
    decoded = images.decoded(
        path, lambda: [(f.info.get("duration", 0), f.convert("RGBA")) for f in ImageSequence.Iterator(image)]
    )
    durations, frames = zip(*decoded, strict=True)
    total = sum(durations) / 1000  # s
    return list(frames), count / total if total > 0 else None


def clip_of(pictures: list[Image.Image], names: list[str], fps: float | None = None) -> Clip:
    """Pictures as a clip. Raises InputError for several sizes, and where only some have transparency."""
    first = pictures[0]
    for picture, name in zip(pictures, names, strict=True):
        if picture.size != first.size:
            sizes = f"{picture.width}×{picture.height}, the ones before it {first.width}×{first.height}"
            raise InputError(f"{fileio.quoted(name)} is {sizes}; all need one size")
    converted = [picture.convert("RGBA") for picture in pictures]
    # An alpha channel that is opaque everywhere says nothing about where the object is.
    opaque = [name for name, p in zip(names, converted, strict=True) if np.asarray(p.getchannel("A")).min() == 255]
    if opaque and len(opaque) < len(names):
        raise InputError(f"{fileio.quoted(opaque[0])} has no transparency and other frames have; make them all alike")
    return Clip(tuple(converted), tuple(names), fps, bool(opaque), _digest(converted))


def _digest(pictures: Iterable[Image.Image]) -> str:
    content = hashlib.sha256()
    for picture in pictures:
        content.update(f"{picture.size}".encode() + picture.tobytes())
    return content.hexdigest()


def _natural_key(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part[:DIGITS]), "") if part.isdecimal() else (-1, part.lower()) for part in parts]


def _rembg_models(model: str) -> list[Path]:
    """Where rembg looks for its model, now and in older releases."""
    shared = os.environ.get("XDG_DATA_HOME")
    old = os.environ.get("U2NET_HOME") or str(Path(shared or "~") / ".u2net")
    new = os.environ.get("U2NET_HOME") or os.environ.get("REMBG_HOME") or (f"{shared}/rembg" if shared else "~/.rembg")
    file = f"{model}.onnx"
    return [Path(old).expanduser() / file, Path(new).expanduser() / "models" / model / file]
