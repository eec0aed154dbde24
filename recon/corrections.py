"""What each picture says differently from all others: its colours, pose, moment and sharpness, solved beside the model.

Generated pictures disagree; a model fitted to their mean blurs.  Here every picture has a small correction of its
own: a rigid motion of the scene and a shift in time that it is rendered with, an affine colour and a blur that the
render is mapped by.  Each visit solves for them in closed form: the most probable values given the residual and a
prior around "nothing", which is ridge regression; for pose and time, one Gauss-Newton step (image alignment, Lucas and
Kanade 1981).  What all pictures of a moment have in common is the model's own: corrections are read less that mean,
and less the share of them that the noise of such estimates explains, so that pictures which agree are left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2.recon.config import ReconstructConfig
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.losses import soften
from d2.recon.raster import rasterize

SOLVE_SIZE = 64  # pixels of the longer side that poses and moments are solved at
TIME_STEP = 0.01  # of the clip, of the difference that stands for a derivative
# kind -> numbers a picture has of it, how large they usually are (standard deviation of the prior), and the part of a
# picture whose residual says one thing: errors of a model are not white.
KINDS = {"colors": (6, 0.1, 0.0004), "poses": (6, 0.03, 0.016), "times": (1, 0.02, 0.008), "blurs": (1, 0.5, 0.004)}
FIELDS = {"colors": "correct_colors", "poses": "correct_poses", "times": "correct_times", "blurs": "correct_blurs"}
# A picture is solved for whenever it is seen during the first epochs, then in every few of them.
SETTLING, SELDOM = 8, 8
SHARP = 0.2  # the share of pictures whose sharpness counts as sharp


class Correction(NamedTuple):
    """Of one picture; None where that kind is off."""

    colors: Tensor | None = None  # [6] gain - 1 and offset of r, g, b
    poses: Tensor | None = None  # [6] rotation vector of the scene in radians, translation in half sides, world axes
    times: Tensor | None = None  # [1] of the clip
    blurs: Tensor | None = None  # [1] share of the softened picture, 0..1


@dataclass
class Corrections:
    """The corrections [n, …] of n training pictures, by kind, as their last visits left them."""

    values: dict[str, Tensor]
    noise: dict[str, Tensor]  # [n, …] variances of their errors, 0 before a picture's first visit; none of blurs
    centre: Tensor  # [3] world, that poses turn about
    half_side: float  # world, that poses move in

    @classmethod
    def start(cls, data: Dataset, config: ReconstructConfig, centre: Tensor, half_side: float) -> Corrections | None:
        """Zero ones of the kinds that the configuration asks for; None where it asks for none."""
        kinds = [kind for kind, field in FIELDS.items() if getattr(config, field)]
        values = {kind: torch.zeros(len(data), KINDS[kind][0], device=centre.device) for kind in kinds}
        noise = {kind: torch.zeros_like(value) for kind, value in values.items() if kind != "blurs"}
        return cls(values, noise, centre, half_side) if values else None

    def of_picture(self, k: int, data: Dataset) -> Correction:
        """Picture k's correction, less what pictures of its moment have in common."""
        moment = 0.5 * int(data.views.max() + 1) / len(data)  # half of the distance between two
        peers = ((data.times - data.times[k]).abs() < moment).nonzero()[:, 0]
        found = {kind: self.values[kind][k] for kind in self.values}
        for kind in ("colors", "times"):
            if kind in found:
                found[kind] = found[kind] - self.values[kind][peers].mean(0)
        if "poses" in found:
            found["poses"] = found["poses"] - self._common_motion(k, peers, data)
        for kind in self.noise:
            found[kind] = self._told(kind) * found[kind]
        if "blurs" in found:
            found["blurs"] = (found["blurs"] - self.values["blurs"].quantile(SHARP)).clamp_min(0)
        return Correction(**found)

    def _told(self, kind: str) -> Tensor:
        """The share [numbers] of the values that is not noise: what James and Stein (1961) would believe of them."""
        visited = (self.noise[kind] > 0).any(1)
        noise, values = self.noise[kind][visited], self.values[kind][visited]
        return (1 - noise.mean(0) / values.square().mean(0).clamp_min(1e-12)).nan_to_num(0.0).clamp_min(0)

    def _common_motion(self, k: int, peers: Tensor, data: Dataset) -> Tensor:
        """The part [6] of k's pose that no picture can tell: the object moved, or all cameras nearer or higher.

        Turns and moves that are one vector in the world or one vector in every camera's axes, by least squares.
        """
        axes = torch.cat([torch.eye(3).to(data.viewmats).expand(len(peers), 3, 3), data.viewmats[peers, :3, :3].mT], -1)
        poses = self.values["poses"][peers].view(-1, 2, 3)
        normal = torch.einsum("nij,nik->jk", axes, axes) + 1e-3 * torch.eye(6, device=axes.device)
        common = torch.linalg.solve(normal, torch.einsum("nij,nmi->jm", axes, poses))  # [6, turn and move]
        own = torch.cat([torch.eye(3).to(axes), data.viewmats[k, :3, :3].T], -1)
        return (own @ common).T.flatten()

    def camera(self, k: int, correction: Correction, data: Dataset) -> tuple[Tensor, Tensor]:
        """World to camera [4, 4] and time [] that picture k is rendered with."""
        viewmat, time = data.viewmats[k], data.times[k]
        if correction.times is not None:
            time = time + correction.times[0]
        return viewmat if correction.poses is None else viewmat @ self._motion(correction.poses), time

    def _motion(self, pose: Tensor) -> Tensor:
        """The scene's rigid motion [4, 4]: turned about its centre, then moved."""
        x, y, z = pose[:3].unbind()
        zero = torch.zeros_like(x)
        R = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3))
        motion = torch.eye(4, device=pose.device)
        motion[:3, :3], motion[:3, 3] = R, self.centre - R @ self.centre + self.half_side * pose[3:]
        return motion

    @torch.no_grad()
    def visit(
        self,
        k: int,
        correction: Correction,  # what it was rendered with
        image: Tensor,  # [H, W, 3] premultiplied render of picture k with that camera
        alpha: Tensor,  # [H, W, 1]
        data: Dataset,
        gaussians: Gaussians4D,
    ) -> None:
        """Solves for picture k's correction again."""
        x, y = torch.cat([image, alpha], -1), data.images[k] / 255
        if "colors" in self.values:
            self.values["colors"][k], self.noise["colors"][k] = _colors(x, y)
        mapped = corrected(x, correction._replace(blurs=None))
        if "blurs" in self.values:
            self.values["blurs"][k] = _blur(mapped, y)
        if "poses" in self.values or "times" in self.values:
            self._align(k, correction, mapped, y, data, gaussians)

    def _align(
        self, k: int, correction: Correction, x: Tensor, y: Tensor, data: Dataset, gaussians: Gaussians4D
    ) -> None:
        """One Gauss-Newton step of pose and time that takes the render x nearer to the picture y."""
        factor = math.ceil(max(x.shape[:2]) / SOLVE_SIZE)
        x, y = _shrunk(x, factor), _shrunk(y, factor)
        K = torch.diag(torch.tensor([1 / factor, 1 / factor, 1.0], device=x.device)) @ data.Ks[k]
        viewmat, time = self.camera(k, correction, data)
        now = _draw(gaussians, viewmat, K, time, x.shape[:2], "RGB+ED")
        columns = {}
        if "poses" in self.values:
            columns["poses"] = self._pose_columns(x, now[..., 3], viewmat, K)
        if "times" in self.values:
            later = _draw(gaussians, viewmat, K, time + TIME_STEP, x.shape[:2], "RGB")
            columns["times"] = F.pad(later - now[..., :3], (0, 1))[None] / TIME_STEP
        J = torch.cat(list(columns.values())).flatten(1)  # [unknowns, pixels · 4]
        prior = torch.cat([_prior(kind, x, y).expand(len(c)) for kind, c in columns.items()])
        current = torch.cat([getattr(correction, kind) for kind in columns])
        precision = J @ J.T + torch.diag(prior)
        step = torch.linalg.solve(precision, J @ (y - x).flatten() - prior * current)
        usual = torch.cat([torch.full((len(c),), KINDS[kind][1]) for kind, c in columns.items()]).to(x)
        noise = torch.linalg.inv(precision).diagonal() * prior * usual**2
        sizes = [len(c) for c in columns.values()]
        moved = current + step.clamp(-usual, usual)  # the pictures are linear that far
        for kind, value, variance in zip(columns, moved.split(sizes), noise.split(sizes), strict=True):
            self.values[kind][k], self.noise[kind][k] = value, variance

    def _pose_columns(self, x: Tensor, depth: Tensor, viewmat: Tensor, K: Tensor) -> Tensor:
        """How the render changes [6, h, w, 4] with a motion of the scene, from its depth [h, w] and its slopes."""
        h, w = x.shape[:2]
        R = viewmat[:3, :3]
        centre = R @ self.centre + viewmat[:3, 3]
        depth = torch.where((depth - centre[2]).abs() < self.half_side, depth, centre[2])  # where there is something
        v, u = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        rays = torch.stack([(u.to(K) - K[0, 2]) / K[0, 0], (v.to(K) - K[1, 2]) / K[1, 1], torch.ones_like(depth)], -1)
        places = rays * depth[..., None]  # camera axes
        turned = torch.linalg.cross(R.T[:, None, None].expand(3, h, w, 3), (places - centre).expand(3, h, w, 3))
        moves = torch.cat([turned, (self.half_side * R.T)[:, None, None].expand(3, h, w, 3)])  # [6, h, w, 3]
        flow_u = K[0, 0] * (moves[..., 0] - rays[..., 0] * moves[..., 2]) / depth
        flow_v = K[1, 1] * (moves[..., 1] - rays[..., 1] * moves[..., 2]) / depth
        across, down = (0.5 * (torch.roll(x, -1, axis) - torch.roll(x, 1, axis)) for axis in (1, 0))
        return -(flow_u[..., None] * across + flow_v[..., None] * down)


def is_due(epoch: int) -> bool:
    """Whether pictures are solved for in this epoch."""
    return epoch < SETTLING or epoch % SELDOM == 0


def corrected(layers: Tensor, correction: Correction) -> Tensor:  # [H, W, 4] premultiplied, both
    """A render in the colours and with the sharpness of one picture."""
    if correction.colors is not None:
        gain, offset = correction.colors[:3], correction.colors[3:]
        layers = torch.cat([layers[..., :3] * (1 + gain) + layers[..., 3:] * offset, layers[..., 3:]], -1)
    if correction.blurs is not None and correction.blurs > 0:
        layers = layers.lerp(soften(layers), float(correction.blurs))
    return layers


def _colors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gain - 1 and offset [6] that take x nearest to y, and their variances [6]."""
    columns = torch.stack([x[..., :3], x[..., 3:].expand_as(x[..., :3])]).flatten(1, 2)  # [2, HW, 3]
    normal = torch.einsum("ipc,jpc->cij", columns, columns)
    prior = _prior("colors", x, y)
    covariance = torch.linalg.inv(normal + prior * torch.eye(2, device=x.device))
    right = torch.einsum("ipc,pc->ci", columns, (y - x)[..., :3].flatten(0, 1))
    values = torch.einsum("cij,cj->ic", covariance, right).flatten()
    return values, covariance.diagonal(dim1=1, dim2=2).T.flatten() * prior * KINDS["colors"][1] ** 2


def _blur(x: Tensor, y: Tensor) -> Tensor:
    """The share [1] of the softened x that takes x nearest to y."""
    change = soften(x) - x
    return ((change * (y - x)).sum() / (change.square().sum() + _prior("blurs", x, y))).clamp(-1, 1)[None]


def _prior(kind: str, x: Tensor, y: Tensor) -> Tensor:
    """What the prior adds to the normal equations []: the residual's variance over that of usual values."""
    _, usual, alike = KINDS[kind]
    inside = torch.maximum(x[..., 3], y[..., 3]) > 0
    variance = (y - x).square().mean(-1)[inside].mean().nan_to_num(0.0).clamp_min(1e-8)
    return variance * alike * inside.numel() / usual**2


def _shrunk(layers: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(layers.permute(2, 0, 1)[None], factor, ceil_mode=True)[0].permute(1, 2, 0)


def _draw(gaussians: Gaussians4D, viewmat: Tensor, K: Tensor, time: Tensor, size, mode) -> Tensor:
    """One picture [h, w, D], without gradients."""
    arguments, motion = gaussians.map(torch.detach).activated(time[None])
    image, _, _ = rasterize(
        **arguments, viewmats=viewmat[None], Ks=K[None], width=size[1], height=size[0],
        sh_degree=gaussians.sh_degree, motion=motion, render_mode=mode,
    )  # fmt: skip
    return image[0]
