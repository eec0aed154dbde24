"""Rendered video: a shot of a reconstruction as a file, or as numbered PNG or EXR pictures, with its passes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from d2 import destination, fileio, images, machine, video
from d2.errors import InputError, Stopped
from d2.recon import drawing, shots, targets
from d2.recon.drawing import Picture
from d2.recon.formats import exr, sequence
from d2.recon.gaussians import Gaussians4D
from d2.recon.sources import Source, find, in_memory
from d2.recon.viewer import reference

SEQUENCES = ("png", "exr")
FORMATS = (*video.CODECS, *SEQUENCES)
PASSES = ("alpha", "depth")
NAMED = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "transparent": None}
FARTHEST = 0.1  # grey of the farthest point in a depth pass; 0 is where nothing is
_BYTES = {"png": 2, "exr": 6}  # about, a pixel, of what is mostly background
_OPAQUE = 0.5  # alpha from which on a depth pass has a depth

Color = tuple[float, float, float]
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Film:
    """What `render` wrote."""

    path: Path  # the video, or the folder of pictures
    passes: dict[str, Path]  # alpha, depth: the same beside it
    width: int  # as it stands in the file, pixels
    height: int
    frames: int
    fps: float
    near: float  # depth (world) that the depth pass shows in white
    far: float  # and in its darkest grey


class Feed(NamedTuple):
    """One output while it is written."""

    pixels: Callable[[np.ndarray, Picture], Any]  # display-referred RGBA and what it was made of -> what `send` takes
    send: Callable[[Any, float], None]  # and the time


def render(
    source: str | Path | Gaussians4D,
    path: str | Path = "turntable",
    out: str | Path | None = None,
    *,
    format: str | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    seconds: float | None = None,
    turns: int | None = None,
    time: float | None = None,
    elevation_deg: float | None = None,
    fov_deg: float | None = None,
    background: str | None = None,
    beside_input: bool = False,
    passes: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
    should_stop: Callable[[], int] = lambda: 0,
) -> Film:
    """Renders a reconstruction along a camera path and returns what was written.

    `source` is what `export` takes; `path` what `shots.plan` explains; `size` is (width, height) in pixels, by
    default 512 × 512 or what the camera's file says.  `out` is a file with a suffix of FORMATS, or a folder; by
    default `render/` beside the Gaussians.  Video is 8 bits a channel (ProRes 4444: 10 and more) in Rec. 709; PNG has
    straight alpha; EXR is scene-linear, half float, premultiplied.  `background` is white, black, transparent or
    #rrggbb: by default white for mp4 and gif, transparent where the format keeps it.  Passes go beside it as
    `<name>_alpha` and `<name>_depth` (white at `Film.near`, darker with depth, black where nothing is; 16 bits in
    PNG); in EXR alpha is there always and depth is channel Z, in world units along the optical axis.

    Raises InputError for what cannot be used, ConflictError for a file that exists without `overwrite`, SetupError
    for a device, a codec or a package that is not there, all before anything is drawn; Stopped when `should_stop`
    returns a signal.  Every output appears whole or not at all.
    """
    found = in_memory(source) if isinstance(source, Gaussians4D) else find(source)
    if len(found.gaussians) == 0:
        raise InputError("nothing to render: there are no Gaussians")
    wishes = shots.Wishes(size, fps, seconds, turns, time, elevation_deg, fov_deg)
    shot = shots.plan(str(path), found, wishes)
    folder, stem, format = _where(out, found, shot.name, format)
    behind = _background(background, format)
    extra = _passes(passes, format, beside_input)
    outputs = {what: folder / f"{stem}{_TAIL[what]}{_ending(format)}" for what in ("color", *extra)}
    for target in outputs.values():
        targets.check_free(target, overwrite)
    _require(format)
    _check_rate(shot.fps, format)
    drawer = machine.choose_device(device)
    beside = _input_pictures(found, shot) if beside_input else None
    wide = shot.width * (2 if beside_input else 1)
    destination.require_space(folder, _BYTES.get(format, 0) * wide * shot.height * len(shot.times))
    for target in outputs.values():
        targets.remove_leftovers(target)
    near, far = shot.depth_range(found.gaussians)
    with ExitStack() as stack:
        plan = _Plan(shot, format, behind, wide, near, far, overwrite)
        feeds = [stack.enter_context(plan.feed(what, target)) for what, target in outputs.items()]
        pictures = drawing.draw(
            found.gaussians.map(lambda tensor: tensor.to(drawer)), shot.c2w, shot.Ks, shot.width, shot.height,
            shot.times, depth="depth" in passes,
        )  # fmt: skip
        for index, picture in enumerate(pictures):
            if should_stop():
                raise Stopped(f"stopped at picture {index} of {len(shot.times)}; nothing was written", should_stop())
            time_of = float(shot.times[index])
            whole = picture if beside is None else _joined(beside(time_of), picture)
            rgba = drawing.over(whole, behind)
            for feed in feeds:
                feed.send(feed.pixels(rgba, whole), time_of)
            progress(shot.name, index + 1, len(shot.times))
    grown = video.encoded_size(wide, shot.height, video.CODECS[format]) if format in video.CODECS else None
    width, height = grown or (wide, shot.height)
    written = {what: target for what, target in outputs.items() if what != "color"}
    return Film(outputs["color"], written, width, height, len(shot.times), shot.fps, near, far)


@dataclass(frozen=True)
class _Plan:
    shot: shots.Shot
    format: str
    background: Color | None
    width: int  # of a picture, the input beside it included
    near: float
    far: float
    overwrite: bool

    @contextlib.contextmanager
    def feed(self, what: str, target: Path) -> Iterator[Feed]:
        """Opens one output: the pictures themselves or a pass."""
        shot, clear = self.shot, what == "color" and self.background is None
        pixels = {"color": self._color, "alpha": self._alpha, "depth": self._depth}[what]
        if self.format in video.CODECS:
            codec = video.CODECS[self.format]
            with video.writer(target, self.width, shot.height, shot.fps, codec, clear) as send:
                yield Feed(lambda rgba, seen: _levels(pixels(rgba, seen), codec.deep), lambda data, time: send(data))
            return
        about = {"near": self.near, "far": self.far} if what == "depth" else {}
        with sequence.writing(
            target,
            target.name.removesuffix(_ending(self.format)),
            f".{self.format}",
            len(shot.times),
            shot.fps,
            overwrite=self.overwrite,
            about=about,
        ) as add:
            if self.format == "exr":
                yield Feed(lambda rgba, seen: exr.encode(rgba, seen.depth), add)
            else:
                deep = what == "depth"
                yield Feed(lambda rgba, seen: images.png_bytes(_grey(_levels(pixels(rgba, seen), deep), what)), add)

    def _color(self, rgba: np.ndarray, seen: Picture) -> np.ndarray:
        return rgba if self.background is None else rgba[..., :3]

    def _alpha(self, rgba: np.ndarray, seen: Picture) -> np.ndarray:
        return np.repeat(seen.alpha, 3, -1)

    def _depth(self, rgba: np.ndarray, seen: Picture) -> np.ndarray:
        assert seen.depth is not None
        away = np.clip((seen.depth - self.near) / (self.far - self.near), 0, 1)
        grey = np.where(seen.alpha[..., 0] > _OPAQUE, 1 - (1 - FARTHEST) * away, 0.0)
        return np.repeat(grey[..., None], 3, -1)


def _levels(values: np.ndarray, deep: bool) -> np.ndarray:
    """Floats in 0..1 as uint8, or uint16 where it is deep."""
    return (np.clip(values, 0, 1) * 65535 + 0.5).astype(np.uint16) if deep else images.to_uint8(values)


def _grey(pixels: np.ndarray, what: str) -> np.ndarray:
    return pixels if what == "color" else np.ascontiguousarray(pixels[..., 0])


# -- what was asked for ----------------------------------------------------------------------------------

_TAIL = {"color": "", "alpha": "_alpha", "depth": "_depth"}
_SUFFIXES = {codec.suffix: name for name, codec in video.CODECS.items()}


def _where(out: str | Path | None, found: Source, name: str, format: str | None) -> tuple[Path, str, str]:
    """Folder, what names begin with, and format."""
    if format is not None and format not in FORMATS:
        raise InputError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    suffix = "" if out is None or Path(out).is_dir() else Path(out).suffix.lower()
    if out is None or suffix == "":
        return targets.folder(out, found.folder, "render"), name, format or "mp4"
    known = _SUFFIXES.get(suffix)
    if known is None or format not in (None, known):
        expected = f"{video.CODECS[format].suffix}" if format in video.CODECS else ", ".join(_SUFFIXES)
        hint = f"; {format or 'png'} goes into a folder: --out DIR" if format in SEQUENCES or suffix == ".png" else ""
        raise InputError(f"--out {fileio.quoted(out)}: expected a folder or a file with suffix {expected}{hint}")
    return targets.folder(Path(out).parent, None, ""), Path(out).stem, known


def _ending(format: str) -> str:
    """What the name of an output ends with: a suffix, or that of a folder of pictures."""
    return video.CODECS[format].suffix if format in video.CODECS else f"_{format}"


def _background(text: str | None, format: str) -> Color | None:
    keeps = format in SEQUENCES or video.CODECS[format].alpha is not None
    if text is None:
        return None if keeps and format != "gif" else NAMED["white"]
    if text in NAMED:
        color = NAMED[text]
    else:
        try:
            red, green, blue = ImageColor.getrgb(text)[:3] if text.startswith("#") and len(text) == 7 else ()
        except ValueError as error:
            raise InputError(f"--background {text!r}: expected {', '.join(NAMED)} or #rrggbb") from error
        color = (red / 255, green / 255, blue / 255)
    if color is None and not keeps:
        raise InputError(f"{format} keeps no alpha; choose webm, prores, webp, gif, png or exr, or a --background")
    return color


def _passes(passes: Sequence[str], format: str, beside_input: bool) -> list[str]:
    """The passes that are outputs of their own."""
    unknown = [name for name in passes if name not in PASSES]
    if unknown:
        raise InputError(f"unknown pass {', '.join(map(repr, unknown))}; known: {', '.join(PASSES)}")
    if passes and beside_input:
        raise InputError("--passes mean nothing beside the input; leave out one of the two")
    return [] if format == "exr" else list(dict.fromkeys(passes))


def _require(format: str) -> None:
    if format in video.CODECS:
        video.require(video.CODECS[format])
    elif format == "exr":
        exr.require()


def _check_rate(fps: float, format: str) -> None:
    most = video.CODECS[format].max_fps if format in video.CODECS else 1000.0
    if fps > most:
        raise InputError(f"{format} plays at most {most:g} frames a second, got {fps:g}; pass --fps {most:g}")


# -- the input beside ------------------------------------------------------------------------------------


def _input_pictures(found: Source, shot: shots.Shot) -> Callable[[float], Picture]:
    """The input's picture nearest to a time, in the middle of one as large as the shot's."""
    times, read = _input_clip(found)

    def at(time: float) -> Picture:
        straight = read(int(np.abs(times - time).argmin()))
        scale = min(shot.width / straight.shape[1], shot.height / straight.shape[0])
        width, height = (max(1, round(scale * side)) for side in (straight.shape[1], straight.shape[0]))
        premultiplied = Image.fromarray(images.to_uint8(images.resize_rgba(straight, *straight.shape[1::-1])))
        whole = Image.new("RGBA", (shot.width, shot.height))
        corner = ((shot.width - width) // 2, (shot.height - height) // 2)
        whole.paste(premultiplied.resize((width, height), Image.Resampling.LANCZOS), corner)
        pixels = np.asarray(whole, np.float32) / 255
        return Picture(pixels[..., :3], pixels[..., 3:])

    return at


def _input_clip(found: Source) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
    """Times [n] of the input's pictures, and what reads one: uint8 [H, W, 4]."""
    if found.run is not None and found.run.stage("generate") is not None:
        matrix = found.run.matrix()
        return np.linspace(0, 1, matrix.frames), lambda k: matrix[matrix.views - 1, k]
    sheet = reference.load(found.folder).get("input") if found.folder else None
    if sheet is None:
        raise InputError("no pictures of the input are kept with these Gaussians; leave out --beside-input")
    whole = Image.open(io.BytesIO(sheet.webp), formats=["WEBP"]).convert("RGBA")

    def read(k: int) -> np.ndarray:
        row, column = divmod(k, sheet.columns)
        left, top = column * sheet.width, row * sheet.height
        return np.asarray(whole.crop((left, top, left + sheet.width, top + sheet.height)))

    return np.array(sheet.times), read


def _joined(left: Picture, right: Picture) -> Picture:
    depth = None if right.depth is None else np.concatenate([np.zeros_like(right.depth), right.depth], 1)
    return Picture(np.concatenate([left.color, right.color], 1), np.concatenate([left.alpha, right.alpha], 1), depth)
