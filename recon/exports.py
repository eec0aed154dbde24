"""From a reconstruction to files other programs open: splats and meshes in many formats, video, contact sheet."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from d2 import destination, fileio, images, video
from d2.errors import InputError
from d2.recon import cameras, drawing, handout, targets
from d2.recon.formats import fourdgs, glb, ply, sequence, sog, splat, splatv, spz, usd
from d2.recon.formats.frames import Frame
from d2.recon.gaussians import Gaussians4D
from d2.recon.mesh import Mesh, MeshConfig
from d2.recon.mesh import write as meshes
from d2.recon.nerf import views as nerf
from d2.recon.nerf.checkpoints import write_checkpoint
from d2.recon.placement import Placement, place
from d2.recon.sources import Source, check_playback, find, in_memory
from d2.recon.viewer.write import BINARY, write_html, write_web
from d2.run import Run, frame_time

CONTACT_COLUMNS = 6  # at most

Progress = Callable[[str, int, int], None]  # format, done, total
_UNMOVED = Placement()
_MESHING = MeshConfig()


@dataclass(frozen=True)
class Clip:
    """What an export function needs."""

    gaussians: Gaussians4D
    name: str
    times: np.ndarray  # [F] in 0..1; one moment: a single file instead of a sequence
    fps: float
    layout: ply.Layout
    size: int  # pixels, of the video
    overwrite: bool
    progress: Progress
    still: bool  # a chosen moment, not a clip
    frame: Frame | None  # the axes that --up asks for; None: those of each format's custom
    length: int  # frames of the whole clip
    folder: Path | None = None  # of the reconstruction
    run: Run | None = None
    tracks: Sequence[cameras.Track] = ()  # the input's, placed as the Gaussians are
    meshing: MeshConfig = _MESHING

    @property
    def seconds(self) -> float:
        """How long the times 0..1 last."""
        return max(self.length - 1, 1) / self.fps

    # What takes long is made when it is first asked for, and once for all formats.

    @functools.cached_property
    def surfaces(self) -> list[Mesh]:
        return meshes.fused(self)

    @functools.cached_property
    def frame_meshes(self) -> list[Mesh]:
        return meshes.per_frame(self)

    @functools.cached_property
    def carried_meshes(self) -> list[Mesh]:
        return meshes.carried(self)


def export(
    source: str | Path | Gaussians4D,
    formats: Sequence[str] = ("ply", "mp4", "contact"),
    out: str | Path | None = None,
    *,
    fps: float | None = None,
    frames: int | None = None,
    span: tuple[int, int] | None = None,
    time: float | None = None,
    name: str | None = None,
    overwrite: bool = False,
    frame: Frame = "rdf",
    up: Literal["y", "z"] | None = None,
    placement: Placement = _UNMOVED,
    pad_sh3: bool = False,
    prune_opacity: float = 0.0,
    size: int = 512,
    meshing: MeshConfig = _MESHING,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Path]:
    """Writes a reconstruction in the formats asked for and returns the path of each.

    `source` is a run folder (its newest reconstruction), a reconstruction's folder, its
    gaussians.safetensors or the Gaussians themselves (then `out` is needed).  `out` is by default the folder
    `export` beside them.  Formats without motion (ply, spz, splat, sog, glb) become a folder each with
    `<name>_0001.ply` …, frames.json and README.txt; usd, usdz, usd-points, splatv and 4dgs are one file `<name>.usd` …;
    then `turntable.mp4`, `contact.png`, `<name>.html` (the viewer in one file) and `web/` (the same for a site);
    `cameras/` holds the input's cameras as USD and GLB, to match its plates.  README.txt says how programs open it.
    nerfstudio is a folder with a checkpoint of its method d2-4dgs; for one moment nerfstudio_moment, a dataset for its
    static methods: the run's own pictures of that moment, or views that the model draws where the run holds none.
    Meshes are proxy geometry: mesh-usd, mesh-glb, mesh-abc, mesh-obj and mesh-ply have the same triangles in every
    frame, fused-usd, fused-obj and fused-ply a surface of its own in each; `meshing` says how they are made.
    `fps` and `frames` are by default what the run or the file says, else 24 and 25;
    `span` (first, end) writes a part of those frames.  With `time` (0..1) everything shows
    that moment, as one file a format; splatv and 4dgs hold the whole motion always.  `placement` is the same
    for all; `up` overrides the custom of each format (GLB is y-up always), `frame` that of PLY and .splat alone.
    `pad_sh3` and `prune_opacity` are those of `formats.ply.Layout`; `size` is the video's, in pixels.

    Raises InputError for what cannot be used and ConflictError for a file that exists without `overwrite`;
    both before anything is written.  Every output appears whole or not at all.
    """
    wanted = _known(formats)
    check_playback(fps, frames)
    _check_ranges(time, size, span, up)
    axes: Frame | None = None if up is None else "world" if up == "z" else "rub"
    layout = ply.Layout(axes or frame, pad_sh3, prune_opacity)
    found = in_memory(source) if isinstance(source, Gaussians4D) else find(source)
    folder = targets.folder(out, found.folder, "export")
    count = frames or found.frames
    if len(found.gaussians) == 0:
        raise InputError("nothing to export: there are no Gaussians")
    times = _moments(time, count, span)
    placed, moved = place(found.gaussians, times, placement)
    clip = Clip(
        placed, found.name if name is None else name, times, fps or found.fps,
        layout, size, overwrite, progress, time is not None, axes, count, *_beside(found, placement),
        meshing=meshing, tracks=[track.moved(moved) for track in _tracks(wanted, found)],
    )  # fmt: skip
    sequence.check_name(clip.name)
    if "sog" in wanted:
        sog.command()
    outputs = {what: folder / file_name(what, clip) for what in wanted}
    for target in outputs.values():
        targets.check_free(target, overwrite)
    destination.require_space(folder, _least_bytes(wanted, clip))
    meshes.require(wanted)
    for what, target in outputs.items():
        for path in {target, target.with_name(SECOND.get(what, target.name))}:
            targets.remove_leftovers(path)
        FORMATS[what](clip, target)
    _write_readme(clip, folder, wanted)
    return outputs


def _tracks(wanted: Sequence[str], found: Source) -> list[cameras.Track]:
    """The cameras of the input, where they are wanted."""
    return cameras.tracks(cameras.load(found.folder)) if "cameras" in wanted else []


def _write_readme(clip: Clip, folder: Path, wanted: Sequence[str]) -> None:
    """README.txt about the single files of this call; sequences have their own, and nobody else's is replaced."""
    single = [what for what in wanted if what in handout.FORMATS and (clip.still or what not in MOMENTS)]
    target = folder / handout.FILE
    targets.remove_leftovers(target)
    if single and (not os.path.lexists(target) or target.read_bytes().startswith(handout.MARK.encode())):
        fileio.atomic_write(target, handout.text(single, clip).encode())


def _beside(found: Source, placement: Placement) -> tuple[Path | None, Run | None]:
    """Folder and run whose cameras and pictures the page shows; none once the asset is placed elsewhere."""
    return (found.folder, found.run) if placement == _UNMOVED else (None, None)


def _least_bytes(wanted: Sequence[str], clip: Clip) -> int:
    """About what the sequences take; SPZ is smaller after gzip."""
    rest = 4 * 3 * (clip.gaussians.sh.shape[1] - 1)
    sizes = {"ply": clip.layout.bytes_per_gaussian(clip.gaussians.sh_degree), "glb": MOMENTS["glb"] + rest, "splat": 32}
    splats = sum(sizes.get(what, 0) for what in wanted) * len(clip.gaussians)
    triangles = sum(meshes.BYTES_A_TRIANGLE[what.split("-")[1]] for what in wanted if what in meshes.FORMATS)
    return (splats + triangles * clip.meshing.triangles) * len(clip.times)


def file_name(what: str, clip: Clip) -> str:
    """Where a format goes within the export folder."""
    if what in MOMENTS:
        return f"{clip.name}.{what}" if clip.still else what
    if what in meshes.FORMATS:
        return meshes.file_name(what, clip)
    named = {
        "mp4": "turntable.mp4",
        "contact": "contact.png",
        "web": "web/index.html",
        "cameras": "cameras/cameras.usda",
        "usd-points": f"{clip.name}_points.usd",
        "nerfstudio": "nerfstudio" if len(clip.times) > 1 else "nerfstudio_moment",
    }
    return named.get(what, f"{clip.name}.{what}")


# -- formats ---------------------------------------------------------------------------------------------


def write_moments(clip: Clip, target: Path, what: str) -> None:
    """One file for a moment, a numbered folder for a clip, in a format that knows no motion."""

    def encode(time: float) -> bytes:
        moment, frame = clip.gaussians.at(time), clip.layout.frame
        match what:
            case "ply":
                return ply.encode(moment, clip.layout, [f"time {time:.9g}"])
            case "spz":
                return spz.encode(moment, clip.frame or "rub")
            case "splat":
                return splat.encode(moment, clip.frame or frame)
            case "sog":
                return sog.encode(moment, clip.layout)
            case _:
                return glb.encode(moment)

    if clip.still:
        fileio.atomic_write(target, encode(float(clip.times[0])))
        clip.progress(what, 1, 1)
        return
    sequence.write(
        encode, target, clip.name, f".{what}", clip.times, clip.fps, overwrite=clip.overwrite,
        beside=handout.beside(what, clip), progress=lambda done, total: clip.progress(what, done, total),
    )  # fmt: skip


def write_usd(clip: Clip, target: Path, what: str = "usd") -> None:
    """One file for clip and moment alike."""
    usd.write(
        clip.gaussians, target, clip.times, clip.fps, up="z" if clip.frame == "world" else "y", name=clip.name,
        points=what == "usd-points", progress=lambda done, total: clip.progress(what, done, total),
    )  # fmt: skip


def write_cameras(clip: Clip, target: Path) -> None:
    """USD, and GLB beside it."""
    during = [track.during(clip.times) for track in clip.tracks]
    usd.write_cameras(during, target, clip.times, clip.fps, up="z" if clip.frame == "world" else "y")
    fileio.atomic_write(target.with_suffix(".glb"), glb.encode_cameras(during, clip.times, clip.fps))
    clip.progress("cameras", 1, 1)


def write_splatv(clip: Clip, target: Path) -> None:
    """The whole motion; the page plays it from 0 to 1."""
    splatv.write(clip.gaussians, target, clip.frame or "rdf")
    clip.progress("splatv", 1, 1)


def write_4dgs(clip: Clip, target: Path) -> None:
    """The whole motion, over as many seconds as the clip takes."""
    fourdgs.write(clip.gaussians, target, clip.length, clip.fps, clip.frame or "rub")
    clip.progress("4dgs", 1, 1)


def write_turntable(clip: Clip, target: Path) -> None:
    """One turn of the camera over whole plays of the clip, on white."""
    times = drawing.loop_times(clip.times, clip.fps)
    pictures = drawing.turntable(clip.gaussians, times, clip.size, clip.size)
    video.write(target, _counted(pictures, len(times), clip.progress), clip.fps)


def write_contact(clip: Clip, target: Path) -> None:
    """Four sides at up to six moments."""
    columns = np.unique(np.linspace(0, len(clip.times) - 1, CONTACT_COLUMNS).round().astype(int))
    sheet = drawing.contact_sheet(
        clip.gaussians,
        clip.times[columns],
        progress=lambda done, total: clip.progress("contact", done, total),
    )
    images.write_png(target, sheet)


def write_nerfstudio(clip: Clip, target: Path) -> None:
    """A clip: a checkpoint of its method d2-4dgs. One moment: a dataset for its static methods."""
    pictures = clip.run if clip.run is not None and clip.run.stage("generate") is not None else None
    with sequence.replacing(target, clip.overwrite) as folder:
        if len(clip.times) > 1:
            views = folder / "views"
            if pictures is None:
                nerf.write_drawn_clip(clip.gaussians, views)
            metadata = {"fps": f"{clip.fps:g}", "frames": str(clip.length)}
            data = target / views.name if pictures is None else pictures.folder
            write_checkpoint(clip.gaussians, metadata, folder, target, data)
        elif pictures is None:
            nerf.write_drawn_moment(clip.gaussians, float(clip.times[0]), folder)
        else:
            nerf.write_moment_of(pictures, float(clip.times[0]), folder)
        fileio.write_json(folder / sequence.MANIFEST, {"fps": clip.fps, "frames": []})
    clip.progress("nerfstudio", 1, 1)


MOMENTS = {
    "ply": 68,
    "spz": 20,
    "splat": 32,
    "sog": 16,
    "glb": 88,
}  # formats without motion: bytes a Gaussian at degree 0
SECOND = {"web": BINARY, "cameras": "cameras.glb"}  # the other file of formats that are two beside each other
FORMATS: dict[str, Callable[[Clip, Path], None]] = {
    **{what: functools.partial(write_moments, what=what) for what in MOMENTS},
    **{what: functools.partial(write_usd, what=what) for what in ("usd", "usdz", "usd-points")},
    "cameras": write_cameras,
    "splatv": write_splatv,
    "4dgs": write_4dgs,
    "nerfstudio": write_nerfstudio,
    "mp4": write_turntable,
    "contact": write_contact,
    "html": write_html,
    "web": write_web,
    **{what: functools.partial(meshes.write_mesh, what=what) for what in meshes.FORMATS},
}


def _counted(pictures: Iterator[np.ndarray], total: int, progress: Progress) -> Iterator[np.ndarray]:
    for index, picture in enumerate(pictures):
        yield picture
        progress("mp4", index + 1, total)


# -- what to read and where to write ---------------------------------------------------------------------


def _known(formats: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(text.strip() for text in formats))
    unknown = [text for text in wanted if text not in FORMATS]
    if unknown or not wanted:
        raise InputError(f"unknown format {', '.join(map(repr, unknown)) or 'list'}; known: {', '.join(FORMATS)}")
    return wanted


def _check_ranges(time: float | None, size: int, span: tuple[int, int] | None, up: str | None) -> None:
    checks = [
        ("time", time, time is None or 0 <= time <= 1, "0..1"),
        ("size", size, 16 <= size <= 4096, "16..4096 pixels"),
        ("frames", span, span is None or 0 <= span[0] < span[1], "first:end, counted from 0"),
        ("up", up, up in (None, "y", "z"), "y, z"),
    ]
    for what, value, good, expected in checks:
        if not good:
            raise InputError(f"{what} must be in {expected}, got {value!r}")


def _moments(time: float | None, frames: int, span: tuple[int, int] | None) -> np.ndarray:
    """The times [F] that are written: one, all frames of the clip, or those of `span` (its end excluded)."""
    if time is not None:
        return np.array([time])
    times = np.array([frame_time(k, frames) for k in range(frames)])
    if span is not None and span[1] > frames:
        raise InputError(f"frames {span[0]}:{span[1]} are not in the clip, which has {frames}")
    return times if span is None else times[slice(*span)]
