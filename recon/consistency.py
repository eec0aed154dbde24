"""Whether a model's pictures of one moment show one object: each is compared with its neighbour, warped by depth."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from d2.recon.dataset import Dataset
from d2.recon.drawing import framing
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import rasterize

TURN = math.radians(10)  # between a camera and its neighbour, around the object
SOLID = 0.9  # alpha from which a pixel shows a surface, not its edge
DEPTH_TOLERANCE = 0.05  # of the object's radius: what counts as the same surface


class View(NamedTuple):
    """What one camera sees of the model."""

    viewmat: Tensor  # [4, 4] world to camera, OpenCV
    image: Tensor  # [H, W, 3] over the background
    depth: Tensor  # [H, W] expected, along the camera's z axis; infinite where alpha is below one half
    alpha: Tensor  # [H, W]


class Agreement(NamedTuple):
    """Sums over the pixels of one pair of views."""

    squared: float  # of the colours' differences, over what both views must show, and the three channels
    compared: int  # pixels that both views must show: what a nearer surface hides is left out, and edges
    gaps: int  # of them, those where the neighbour looks through the surface
    pixels: int  # solid pixels of the first view


@torch.no_grad()
def cross_view(
    model: Gaussians4D, cells: Dataset, index: list[int], antialiased: bool = False
) -> dict[str, float | None]:
    """How well renders agree with renders of the same moment from a camera turned by 10° around the object.

    Every solid pixel goes to where the neighbour sees its point, at the expected depth, between four pixels.  Where
    any of them shows a nearer surface the point is hidden, and where they don't agree it is on an edge: neither
    counts.  "cross_view_error" is the root mean square difference of the colours of all others, 0..1;
    "cross_view_gaps" is the share of them where all four show something farther: a surface that is there from one side
    only.  Both are 0 for one opaque, matt object; None without solid pixels.  `index` chooses the cells whose cameras
    and moments are used.
    """
    centre, radius = framing(model)
    middle = torch.from_numpy(centre).to(cells.viewmats)
    total = Agreement(0.0, 0, 0, 0)
    for k in index:
        first = _see(model, cells, k, cells.viewmats[k], antialiased)
        second = _see(model, cells, k, turned(cells.viewmats[k], middle, TURN), antialiased)
        found = compare(first, second, cells.Ks[k], DEPTH_TOLERANCE * radius)
        total = Agreement(*(a + b for a, b in zip(total, found, strict=True)))
    if not total.compared:
        return {"cross_view_error": None, "cross_view_gaps": None}
    return {
        "cross_view_error": round(math.sqrt(total.squared / (3 * total.compared)), 5),
        "cross_view_gaps": round(total.gaps / total.compared, 5),
    }


def compare(first: View, second: View, K: Tensor, tolerance: float) -> Agreement:
    """The first view's solid pixels against what the second shows at the same points, within `tolerance` (world)."""
    solid = (first.alpha > SOLID).nonzero()
    points = _unproject(first, K, solid)
    camera = points @ second.viewmat[:3, :3].T + second.viewmat[:3, 3]
    projected = camera @ K.T
    xy = projected[:, :2] / projected[:, 2:]
    height, width = second.alpha.shape
    seen = (camera[:, 2] > 0) & (xy >= 0.5).all(-1) & (xy <= xy.new_tensor([width, height]) - 0.5).all(-1)
    column, row = (xy - 0.5).floor().long().clamp_min(0).unbind(-1)
    columns, rows = ((k[:, None] + torch.arange(2, device=k.device)) for k in (column, row))
    around = second.depth[rows.clamp_max(height - 1)[:, :, None], columns.clamp_max(width - 1)[:, None]].flatten(1)
    behind, same = around > camera[:, 2:] + tolerance, (around - camera[:, 2:]).abs() <= tolerance
    gaps = seen & behind.all(-1)
    counted = gaps | (seen & same.all(-1))
    difference = first.image[solid[:, 0], solid[:, 1]] - _sample(second.image, xy)
    return Agreement(
        float(difference[counted].double().square().sum()), int(counted.sum()), int(gaps.sum()), len(solid)
    )


def turned(viewmat: Tensor, centre: Tensor, angle: float) -> Tensor:
    """The camera [4, 4] turned by `angle` (rad) around `centre` [3], about its own vertical axis."""
    c, s = math.cos(angle), math.sin(angle)
    about_y = viewmat.new_tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    pivot = viewmat[:3, :3] @ centre + viewmat[:3, 3]  # stays where it is in the camera's frame
    result = viewmat.clone()
    result[:3, :3] = about_y @ viewmat[:3, :3]
    result[:3, 3] = about_y @ (viewmat[:3, 3] - pivot) + pivot
    return result


def surface_points(
    model: Gaussians4D, cells: Dataset, index: list[int], time: float, antialiased: bool = False
) -> Tensor:
    """World points [n, 3] of the surfaces that the cameras of some cells see of the model at one moment."""
    found = []
    moment = torch.full_like(cells.times, time)
    for k in index:
        view = _see(model, cells, k, cells.viewmats[k], antialiased, moment)
        found.append(_unproject(view, cells.Ks[k], (view.alpha > SOLID).nonzero()))
    return torch.cat(found)


@torch.no_grad()
def _see(
    model: Gaussians4D, cells: Dataset, k: int, viewmat: Tensor, antialiased: bool, times: Tensor | None = None
) -> View:
    arguments, moving = model.activated((cells.times if times is None else times)[k : k + 1])
    image, alpha, _ = rasterize(
        **arguments, viewmats=viewmat[None], Ks=cells.Ks[k : k + 1], width=cells.width, height=cells.height,
        sh_degree=model.sh_degree, motion=moving, render_mode="RGB+ED", backgrounds=cells.background[None],
        rasterize_mode="antialiased" if antialiased else "classic",
    )  # fmt: skip
    opacity = alpha[0, ..., 0]
    depth = image[0, ..., 3].where(opacity > 0.5, torch.inf)
    return View(viewmat, image[0, ..., :3].clamp(0, 1), depth, opacity)


def _unproject(view: View, K: Tensor, pixels: Tensor) -> Tensor:  # [n, 2] row, column -> [n, 3] world
    rows, columns = pixels.unbind(-1)
    z = view.depth[rows, columns]
    rays = torch.stack([columns + 0.5, rows + 0.5, torch.ones_like(columns)], -1).to(K) @ torch.linalg.inv(K).T
    return (rays * z[:, None] - view.viewmat[:3, 3]) @ view.viewmat[:3, :3]


def _sample(image: Tensor, xy: Tensor) -> Tensor:  # [H, W, 3], [n, 2] pixels -> [n, 3], bilinear
    height, width = image.shape[:2]
    grid = 2 * xy / xy.new_tensor([width, height]) - 1
    found = torch.nn.functional.grid_sample(
        image.permute(2, 0, 1)[None], grid[None, None], align_corners=False, padding_mode="border"
    )
    return found[0, :, 0].T
