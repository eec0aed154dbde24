"""The cameras of a reconstruction's input: kept beside the model as JSON, and read from any transforms.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2 import camera, fileio
from d2.errors import InputError
from d2.recon import dataset
from d2.recon.dataset import Dataset
from d2.recon.placement import Similarity

FILE = "cameras.json"  # in a reconstruction's folder; the layout of transforms.json
UNKNOWN_SIDE = 512  # pixels, where a file gives a field of view alone


@dataclass(frozen=True)
class Cameras:
    """n pictures: where each was taken from, and when."""

    c2w: np.ndarray  # [n, 4, 4] OpenGL camera to world
    Ks: np.ndarray  # [n, 3, 3] pixels
    times: np.ndarray  # [n] in 0..1
    views: np.ndarray  # [n] int: pictures with one pose share a view
    width: int
    height: int

    @property
    def moves(self) -> bool:
        """Whether all this is one camera on its way: never two pictures at a time, never two from one place."""
        n = len(self.times)
        return n > 1 and len(np.unique(self.times)) == n and len(np.unique(self.views)) == n

    def input_track(self) -> np.ndarray:
        """Indices in order of time of the pictures of the input: the moving camera, or the view `input_view`."""
        order = np.argsort(self.times, kind="stable")
        return order if self.moves else order[self.views[order] == input_view(self.c2w, self.times, self.views)]


class Track(NamedTuple):
    """One camera as artists' tools take it: standing, or on its way through the clip."""

    name: str
    c2w: np.ndarray  # [n, 4, 4] OpenGL camera to world; n = 1: it stands
    Ks: np.ndarray  # [n, 3, 3] pixels
    times: np.ndarray  # [n] in 0..1
    width: int
    height: int

    def moved(self, similarity: Similarity) -> Track:
        """As it sees the asset once that is placed elsewhere."""
        return self._replace(c2w=similarity.poses(self.c2w))

    def during(self, times: np.ndarray) -> Track:
        """The part of its way within the moments [F] of a clip; of one moment, the nearest place."""
        within = (self.times >= times[0] - 1e-9) & (self.times <= times[-1] + 1e-9)
        kept = np.flatnonzero(within) if within.any() else np.abs(self.times - times[0]).argmin()[None]
        kept = kept if len(self.times) > 1 else np.arange(1)
        return self._replace(c2w=self.c2w[kept], Ks=self.Ks[kept], times=self.times[kept])

    def turned(self, rotation: np.ndarray) -> np.ndarray:  # [n, 4, 4]
        """Its poses in a world turned by p' = rotation p."""
        c2w = self.c2w.copy()
        c2w[:, :3] = rotation @ c2w[:, :3]
        return c2w


def tracks(cameras: Cameras) -> list[Track]:
    """One track a view, that of the input called so, the others by their number."""
    size = cameras.width, cameras.height
    if cameras.moves:
        order = cameras.input_track()
        return [Track("input", cameras.c2w[order], cameras.Ks[order], cameras.times[order], *size)]
    main, found = input_view(cameras.c2w, cameras.times, cameras.views), []
    for view in np.unique(cameras.views):
        first = np.flatnonzero(cameras.views == view)[:1]
        name = "input" if view == main else f"view_{view:02d}"
        found.append(Track(name, cameras.c2w[first], cameras.Ks[first], cameras.times[first], *size))
    return found


def input_view(
    c2w: np.ndarray,  # [n, 4, 4] OpenGL
    times: np.ndarray,  # [n]
    views: np.ndarray,  # [n]
) -> int:
    """The view nearest to the front (looking along +y) among those with the most moments; of equals the first."""
    moments = {int(view): len(np.unique(times[views == view])) for view in np.unique(views)}
    back = c2w[:, :3, 2]
    turned = np.abs(np.round(np.degrees(np.arctan2(back[:, 0], -back[:, 1])), 6))
    longest = [k for k, view in enumerate(views) if moments[int(view)] == max(moments.values())]
    return int(views[min(longest, key=lambda k: (turned[k], k))])


def of(data: Dataset) -> Cameras:
    """Those of a dataset."""
    viewmats = data.viewmats.double().cpu().numpy()
    return Cameras(
        c2w=np.linalg.inv(viewmats) @ camera.OPENGL_TO_OPENCV,
        Ks=data.Ks.double().cpu().numpy(),
        times=data.times.double().cpu().numpy(),
        views=data.views.cpu().numpy(),
        width=data.width,
        height=data.height,
    )


def save(folder: Path, data: Dataset) -> None:
    """Writes the cameras of a dataset into a reconstruction's folder."""
    cameras = of(data)
    frames = [
        {
            "file_path": data.names[k],
            "transform_matrix": cameras.c2w[k].round(9).tolist(),
            "time": round(float(cameras.times[k]), 9),
            **{key: float(cameras.Ks[k][at]) for key, at in _PLACES.items()},
        }
        for k in range(len(data))
    ]
    fileio.write_json(folder / FILE, {"w": cameras.width, "h": cameras.height, "frames": frames})


def load(folder: Path | None) -> Cameras:
    """What `save` wrote. Raises InputError where there is nothing, or it is damaged."""
    if folder is None or not (folder / FILE).is_file():
        where = "Gaussians in memory" if folder is None else fileio.quoted(folder)
        raise InputError(f"{where}: the cameras of the input are not known ({FILE}); name a transforms.json instead")
    return read(folder / FILE)


def read(path: str | Path) -> Cameras:
    """The cameras of a transforms.json; its pictures are not looked at.

    Raises InputError that names the frame and what is wrong with it.
    """
    path = Path(path)
    label = fileio.quoted(path)
    meta = fileio.read_json(path, fileio.TRANSFORMS_CAP)
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise InputError(f"{label}: expected a list of frames, found none")
    for part in (meta, *frames):
        dataset.refuse_distortion(part, path)
    width, height = (_side(meta, frames[0], key, label) for key in ("w", "h"))
    c2w = np.stack([dataset.read_pose(frame, k, path) for k, frame in enumerate(frames)])
    Ks = [dataset.read_intrinsics(f, meta, width, height, f"{label}: frame {k}") for k, f in enumerate(frames)]
    times = np.array(dataset.read_times(frames, path))
    return Cameras(c2w, np.stack(Ks), times, dataset.view_ids(c2w).numpy(), width, height)


_PLACES = {"fl_x": (0, 0), "fl_y": (1, 1), "cx": (0, 2), "cy": (1, 2)}  # in K


def _side(meta: dict[str, Any], frame: dict[str, Any], key: str, label: str) -> int:
    value = frame.get(key, meta.get(key, UNKNOWN_SIDE))
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1 <= value <= 65536 or math.isnan(value):
        raise InputError(f"{label}: {key} must be a number of pixels, got {value!r}")
    return round(value)
