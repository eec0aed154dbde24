"""What each picture says differently from all others: colour, pose, moment and shape, learned beside the model.

Generated pictures disagree; a model fitted to their mean blurs.  Here each has a small correction of its own, drawn
to zero by a prior, that takes up what it alone claims: an affine colour (as NeRF in the Wild's appearance, made
affine), a rigid motion about the scene's centre (BARF), a shift in time, and a smooth displacement in the image.
Corrections are read less their mean over all pictures, so that none of them moves the model as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2.recon.config import ReconstructConfig

WARP_GRID = 5  # control points along a side of the image
# kind -> numbers a picture has of it, and the size of a usual one (what the prior measures in; the learning rate
# is a fraction of it): colour gain and offset, radians and half sides, clips, fractions of the image.
KINDS = {"colors": (6, 0.1), "poses": (6, 0.03), "times": (1, 0.02), "warps": (2 * WARP_GRID**2, 0.012)}
FIELDS = {"colors": "correct_colors", "poses": "correct_poses", "times": "correct_times", "warps": "correct_warps"}


class Correction(NamedTuple):
    """Of one picture; None where that kind is off."""

    colors: Tensor | None  # [6] gain - 1 and offset of r, g, b
    poses: Tensor | None  # [6] rotation vector in radians, translation in half sides
    times: Tensor | None  # [1] of the clip
    warps: Tensor | None  # [2 · WARP_GRID²] x then y, fractions of the image


@dataclass
class Corrections:
    """The learned corrections [n, …] of n training pictures, by kind, in units of their usual size."""

    values: dict[str, Tensor]
    adam: torch.optim.SparseAdam
    centre: Tensor  # [3] world, what poses turn about
    half_side: float  # world, what poses move in

    @classmethod
    def start(
        cls, count: int, config: ReconstructConfig, centre: Tensor, half_side: float, device: torch.device | str
    ) -> Corrections | None:
        """Zero ones of the kinds that the configuration asks for; None where it asks for none."""
        kinds = [kind for kind, field in FIELDS.items() if getattr(config, field)]
        values = {kind: torch.zeros(count, KINDS[kind][0], device=device) for kind in kinds}
        return cls.of(values, centre.float().to(device), half_side) if values else None

    @classmethod
    def of(cls, values: dict[str, Tensor], centre: Tensor, half_side: float) -> Corrections:
        """Around given values, with an optimiser that has not stepped yet."""
        values = {kind: value.detach().clone().requires_grad_() for kind, value in values.items()}
        groups = [{"params": [value], "name": f"corrections.{kind}"} for kind, value in values.items()]
        return cls(values, torch.optim.SparseAdam(groups, lr=1e-3), centre, half_side)

    def of_picture(self, k: int) -> tuple[Correction, Tensor]:
        """Picture k's correction, less the mean of all, and its prior: the mean square in usual sizes."""
        found: dict[str, Tensor | None] = dict.fromkeys(KINDS)
        priors = []
        for kind, value in self.values.items():
            row = torch.nn.functional.embedding(torch.tensor([k], device=value.device), value, sparse=True)[0]
            row = row - value.detach().mean(0)
            priors.append(row.square().mean())
            found[kind] = row * KINDS[kind][1]
        return Correction(**found), torch.stack(priors).sum()

    def viewmat(self, viewmat: Tensor, pose: Tensor | None) -> Tensor:
        """World to camera [4, 4] of a camera that sees the scene turned and moved about its centre by `pose` [6]."""
        if pose is None:
            return viewmat
        x, y, z = pose[:3].unbind()
        zero = torch.zeros_like(x)
        R = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3))
        moved = self.centre + self.half_side * pose[3:] - R @ self.centre
        top = torch.cat([viewmat[:3, :3] @ R, (viewmat[:3, :3] @ moved + viewmat[:3, 3])[:, None]], 1)
        return torch.cat([top, viewmat[3:]])

    def step(self, rate: float) -> None:
        """One step of `rate` usual sizes for the pictures that were drawn since the last."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()


def corrected_image(image: Tensor, alpha: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """The premultiplied render [H, W, 3] and its alpha [H, W, 1] in the colours and the shape of one picture."""
    if correction.colors is not None:
        gain, offset = correction.colors[:3], correction.colors[3:]
        image = image * (1 + gain) + alpha * offset
    if correction.warps is None:
        return image, alpha
    layers = torch.cat([image, alpha], -1).permute(2, 0, 1)[None]
    grid = correction.warps.reshape(1, 2, WARP_GRID, WARP_GRID)
    size = layers.shape[-2:]
    flow = torch.nn.functional.interpolate(grid, size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = (2 * (torch.arange(n, device=image.device) + 0.5) / n - 1 for n in size)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) + 2 * flow
    layers = torch.nn.functional.grid_sample(layers, places[None], padding_mode="border", align_corners=False)[0]
    layers = layers.permute(1, 2, 0)
    return layers[..., :3], layers[..., 3:]
