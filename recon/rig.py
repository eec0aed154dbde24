"""The rig where it is only believed: which way the orbit turns, how wide the lens is, how high the cameras stand.

A model that makes views of an object is told angles, and draws what it takes them for.  A coarse fit of the object
tries both directions of the orbit and keeps the one that explains the pictures better; a second one learns the field
of view and the elevation that all cameras share, and a small pose of each view (BARF, Lin et al. 2021, for Gaussians).
The distance to the object is a gauge and stays: the field of view is learned together with a move towards the object
that leaves its size in the picture, and the world is scaled back after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2 import fileio
from d2.errors import InputError
from d2.recon import hull, train
from d2.recon.config import ReconstructConfig
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D

PROBE_SIZE, PROBE_STEPS, PROBE_GAUSSIANS = 64, 400, 3000
REFINE_SIZE, REFINE_STEPS, REFINE_GAUSSIANS = 128, 2500, 12000
CLEARLY = 0.2  # dB that the other direction must be better by
SAMPLE = 60  # pictures that a coarse fit is judged by
# What a usual error is: of the elevation and of the logarithm of the focal length, and of a view's pose, whose turns
# are in radians and moves in half sides of the scene.  Learning rates and the prior are in these units.
ELEVATION, LOG_FOCAL, POSE = 0.05, 0.1, 0.02
LR, LENS_WEIGHT, POSE_WEIGHT = 0.1, 0.3, 1e-3
# Less than this is told as none: errors of a coarse fit where there is nothing to find.
LEAST_ELEVATION, LEAST_LOG_FOCAL, LEAST_TURN = math.radians(0.3), 0.02, math.radians(0.5)


@dataclass(frozen=True)
class Found:
    """How the rig is, against what was believed."""

    mirrored: bool  # the orbit turns the other way
    focal: float  # factor on all focal lengths
    elevation: float  # rad that all cameras stand higher
    largest_turn: float  # rad, of a view beside that

    def __str__(self) -> str:
        turn = "the orbit turns the other way, " if self.mirrored else ""
        return (
            f"{turn}focal length × {self.focal:.3f}, cameras {math.degrees(self.elevation):+.1f}° in elevation,"
            f" views within {math.degrees(self.largest_turn):.1f}°"
        )

    def as_dict(self) -> dict[str, Any]:
        """For records: angles in degrees."""
        return {
            "mirrored": self.mirrored,
            "focal": round(self.focal, 4),
            "elevation_deg": round(math.degrees(self.elevation), 3),
            "largest_turn_deg": round(math.degrees(self.largest_turn), 3),
        }


class Learned:
    """The parameters of a rig around a believed one, in usual sizes, and their optimiser."""

    def __init__(self, data: Dataset, device: torch.device | str = "cpu") -> None:
        centre, self.half_side = hull.scene_box(data)
        self.centre = torch.from_numpy(centre).float().to(device)
        self.shared = torch.zeros(2, device=device, requires_grad=True)  # elevation, ln focal
        self.poses = torch.zeros(int(data.views.max()) + 1, 6, device=device, requires_grad=True)  # turn, move
        self.adam = torch.optim.Adam([self.shared, self.poses], lr=LR, betas=(0.9, 0.99))

    def viewmats(self, data: Dataset, cells: Tensor) -> Tensor:
        """World to camera [C, 4, 4] of some cells, with the field of view in it: x and y scaled, so that Ks stay."""
        moved, depth = self._moved(data, cells, self.shared[0], self.poses)
        k = torch.exp(LOG_FOCAL * self.shared[1])
        nearer = moved.clone()
        nearer[:, 2, 3] = moved[:, 2, 3] + depth * (k - 1)
        return nearer * torch.stack([k, k, torch.ones_like(k), torch.ones_like(k)])[:, None]

    def _moved(self, data: Dataset, cells: Tensor, elevation: Tensor | float, poses: Tensor) -> tuple[Tensor, Tensor]:
        """Rigid [C, 4, 4] by elevation and poses, about the scene's centre in the camera's axes; and its depth [C]."""
        viewmats, poses = data.viewmats[cells], POSE * poses[data.views[cells]]
        R, t = viewmats[:, :3, :3], viewmats[:, :3, 3]
        at = R @ self.centre + t
        turns = poses[:, :3] + ELEVATION * elevation * torch.tensor([1.0, 0, 0], device=t.device)
        x, y, z = turns.unbind(-1)
        zero = torch.zeros_like(x)
        turn = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3))
        t = (turn @ (t - at)[:, :, None])[..., 0] + at + self.half_side * poses[:, 3:]
        top = torch.cat([turn @ R, t[:, :, None]], -1)
        return torch.cat([top, viewmats[:, 3:]], 1), at[:, 2]

    def prior(self, loss: Tensor) -> Tensor:
        """Lens and views stay as believed where pictures leave them open.

        Perspective is the faintest of all: what pictures contradict each other by hides it, and weighs its prior, as
        the variance of noise does in the posterior of a Gaussian.
        """
        noise = loss.detach().square()
        return LENS_WEIGHT * noise * self.shared[1].square() + POSE_WEIGHT * self.poses.square().mean()

    def step(self, decay: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = LR * decay
        self.adam.step()
        self.adam.zero_grad()

    @torch.no_grad()
    def applied(self, data: Dataset) -> Dataset:
        """The dataset with the cameras as learned, at their old distance; on its own device."""
        here = self.centre.device
        elevation, log_focal, poses = self._told()
        viewmats, _ = self._moved(data.to(here), torch.arange(len(data), device=here), elevation, poses)
        Ks = data.Ks.clone()
        Ks[:, [0, 1], [0, 1]] *= math.exp(LOG_FOCAL * log_focal)
        return replace(data, viewmats=viewmats.to(data.viewmats.device), Ks=Ks)

    def found(self, is_mirrored: bool) -> Found:
        """What was learned, for people."""
        elevation, log_focal, poses = self._told()
        turn = float(POSE * poses[:, :3].norm(dim=1).max())
        return Found(is_mirrored, math.exp(LOG_FOCAL * log_focal), ELEVATION * elevation, turn)

    def _told(self) -> tuple[float, float, Tensor]:
        """Elevation, ln focal length and poses in usual sizes, 0 where they are too small to tell from none."""
        elevation, log_focal = self.shared.detach().tolist()
        poses = self.poses.detach()
        return (
            elevation if abs(ELEVATION * elevation) > LEAST_ELEVATION else 0.0,
            log_focal if abs(LOG_FOCAL * log_focal) > LEAST_LOG_FOCAL else 0.0,
            poses if POSE * poses[:, :3].norm(dim=1).max() > LEAST_TURN else torch.zeros_like(poses),
        )


def refine(
    data: Dataset,  # on the CPU
    config: ReconstructConfig,
    anchor: int,
    device: torch.device | str = "cpu",
    message: Callable[[str], None] = lambda text: None,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[Dataset, Found]:
    """The dataset with the rig that explains its pictures best, and what that is.

    `anchor` is the cell whose azimuth is right by definition: an orbit is mirrored about it.  Elevation, focal length
    and poses too near to what was believed to be told from it are left.  What `after_step` raises ends it.
    """

    def fitted(cells: Dataset, steps: int, gaussians: int, learned: Learned | None = None) -> Gaussians4D:
        state = train.start(cells, _coarse(config, steps, gaussians), device)
        state.rig = learned
        return train.fit(
            state, cells.to(device), _coarse(config, steps, gaussians), lambda state, progress: after_step()
        )

    def explained(cells: Dataset) -> float:
        model = fitted(cells, PROBE_STEPS, PROBE_GAUSSIANS)
        sample = torch.linspace(0, len(cells) - 1, min(SAMPLE, len(cells))).round().long()
        return train.evaluate_psnr(model, cells.subset(sample).to(device), _coarse(config, 1, 1))

    message("Probing which way the orbit turns")
    small = data.shrunk(PROBE_SIZE)
    is_mirrored = explained(mirrored(small, anchor)) > explained(small) + CLEARLY
    if is_mirrored:
        data = mirrored(data, anchor)
    message("Refining field of view, elevation and the views' poses")
    medium = data.shrunk(REFINE_SIZE)
    learned = Learned(medium, device)
    fitted(medium, REFINE_STEPS, REFINE_GAUSSIANS, learned)
    return learned.applied(data), learned.found(is_mirrored)


def _coarse(config: ReconstructConfig, steps: int, gaussians: int) -> ReconstructConfig:
    """A quick fit of all cells as they are, small Gaussians not made brighter by being widened."""
    return replace(
        config, iterations=steps, start_gaussians=gaussians, max_gaussians=gaussians, sh_degree=0, holdout=0,
        coarse_until=0.0, average_over=0, validate_every=steps, correct_colors=False, correct_poses=False,
        correct_times=False, correct_blurs=False, antialiased=True,
    )  # fmt: skip


def mirrored(data: Dataset, anchor: int) -> Dataset:
    """The same pictures from an orbit that turns the other way: azimuths about +z reflected about the anchor's."""
    centre = torch.from_numpy(hull.scene_box(data)[0])
    offset = data.camera_centres().double() - centre
    azimuth = torch.atan2(offset[:, 1], offset[:, 0])
    turn = 2 * (azimuth - azimuth[anchor])  # the world turns by as much as each camera goes back
    cos, sin, zero, one = turn.cos(), turn.sin(), torch.zeros_like(turn), torch.ones_like(turn)
    R = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).view(-1, 3, 3)
    motion = torch.eye(4, dtype=torch.float64).repeat(len(turn), 1, 1)
    motion[:, :3, :3], motion[:, :3, 3] = R, centre - (R @ centre[:, None])[..., 0]
    return replace(data, viewmats=(data.viewmats.double() @ motion).float())


def save(path: Path, data: Dataset, found: Found) -> None:
    """The cameras of a refined dataset, and what was found, in one file."""
    tensors = {"viewmats": data.viewmats, "Ks": data.Ks}
    fileio.write_tensors(path, tensors, {"found": json.dumps(found.as_dict())})


def load(path: Path, data: Dataset) -> tuple[Dataset, dict[str, Any]]:
    """The dataset with the cameras that `save` wrote, and what was found. Raises InputError."""
    tensors, metadata = fileio.read_tensors(path)
    if {name: tensor.shape for name, tensor in tensors.items()} != {
        "viewmats": data.viewmats.shape,
        "Ks": data.Ks.shape,
    }:
        raise InputError(f"{fileio.quoted(path)} holds the cameras of other pictures; start again with --overwrite")
    return replace(data, **tensors), json.loads(metadata["found"])
