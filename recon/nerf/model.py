"""d2's 4D Gaussians as a nerfstudio model: its trainer's steps to fit them, its rasterizer to draw them at any time."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.models.base_model import Model, ModelConfig
from torch import Tensor

from d2 import camera as axes
from d2 import config as configuration
from d2.errors import InputError
from d2.recon import checkpoint, train
from d2.recon.config import ReconstructConfig
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.losses import photometric_loss, ssim
from d2.recon.metrics import psnr
from d2.recon.pipeline import is_generated, kernel_threads, settled
from d2.recon.raster import rasterize


@dataclass
class D2ModelConfig(ModelConfig):
    """What `d2 reconstruct` calls --preset and --set; the number of steps is nerfstudio's --max-num-iterations."""

    _target: type = field(default_factory=lambda: D2Model)
    enable_collider: bool = False
    preset: str = "quality"
    """fast, quality or a YAML file."""
    sets: tuple[str, ...] = ()
    """Fields of the preset to change, as field=value (d2 reconstruct documents them)."""


class D2Model(Model):
    """Holds the whole training state; nerfstudio's checkpoints carry it, so that training resumes where it stopped."""

    config: D2ModelConfig

    def populate_modules(self) -> None:
        """Reads the configuration; Gaussians come from `begin` or from a checkpoint."""
        super().populate_modules()
        self.settings = configuration.load(ReconstructConfig, self.config.preset, sets=self.config.sets)
        self.state: train.State | None = None
        self.metadata: dict[str, str] = {}
        self.register_buffer("background", torch.ones(3))

    @property
    def gaussians(self) -> Gaussians4D:
        """The model as it is now. Raises InputError before there is one."""
        if self.state is None:
            raise InputError("d2-4dgs holds no Gaussians yet: train it or load a checkpoint")
        return self.state.model

    def begin(self, cells: Dataset, path: Path, metadata: dict[str, str]) -> None:
        """Carves the visual hull of the training images, which lie at `path`, and gets ready for `fit_step`."""
        self.settings = replace(settled(self.settings, is_generated(path)), holdout=0)  # the dataparser holds out
        self.metadata = metadata
        with kernel_threads():
            self.state = train.start(cells, self.settings, self.device)
        self.cells = cells.to(self.device)
        self.coarse = train.coarse_cells(self.cells, self.settings)
        self.background = self.cells.background

    def fit_step(self, steps: int) -> Tensor:
        """One step of d2's trainer, of a run of so many; returns the loss."""
        assert self.state is not None
        fraction = self.state.iteration / steps
        with kernel_threads():
            cells = self.coarse if fraction < self.settings.coarse_until else self.cells
            loss = train.step(self.state, cells, self.settings, fraction)
        train.require_finite(self.state, float(loss))
        return loss

    def get_param_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """None: d2's trainer has its own optimiser, whose moments follow the Gaussians as they multiply."""
        return {}

    def get_outputs(self, ray_bundle: Cameras) -> dict[str, Tensor]:
        """What one pinhole camera sees at its time (0 where it has none).

        rgb [H, W, 3] over the background, accumulation [H, W, 1], and depth [H, W, 1] along the camera's axis.
        Raises InputError for another kind of camera.
        """
        cameras = ray_bundle.flatten()
        if not isinstance(ray_bundle, Cameras) or int(cameras.camera_type[0]) != CameraType.PERSPECTIVE.value:
            raise InputError("d2-4dgs draws whole pictures of perspective cameras only")
        viewmats, Ks, times = (x.to(self.device) for x in pinhole(cameras))
        gaussians, motion = self.gaussians.activated(times)
        image, alpha, _ = rasterize(
            **gaussians, viewmats=viewmats, Ks=Ks, width=int(cameras.width[0]), height=int(cameras.height[0]),
            sh_degree=self.gaussians.sh_degree, motion=motion, backgrounds=self.background[None],
            rasterize_mode="antialiased" if self.settings.antialiased else "classic", render_mode="RGB+ED",
        )  # fmt: skip
        return {"rgb": image[0, ..., :3].clamp(0, 1), "accumulation": alpha[0], "depth": image[0, ..., 3:]}

    def get_outputs_for_camera(self, camera: Cameras, obb_box: Any = None) -> dict[str, Tensor]:
        """As `get_outputs`, without gradients; the crop box is ignored."""
        with torch.no_grad():
            return self.get_outputs(camera)

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Tensor:
        """Straight alpha [H, W, 4]."""
        alpha = outputs["accumulation"]
        colour = (outputs[output_name] - (1 - alpha) * self.background) / alpha.clamp_min(1e-6)
        return torch.cat([colour.clamp(0, 1), alpha], -1)

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The photometric loss of a picture, for evaluation during training."""
        truth = (_picture(batch).to(self.device) * 255).round().to(torch.uint8)
        opaque = torch.cat([truth, torch.full_like(truth[..., :1], 255)], -1)
        whole = torch.ones_like(outputs["accumulation"][..., 0])
        return {"loss": photometric_loss(outputs["rgb"], whole, opaque, self.background, self.settings.ssim_weight, 0)}

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR in dB and SSIM over the whole picture; the truth beside the render."""
        truth, image = _picture(batch).to(self.device), outputs["rgb"]
        metrics = {"psnr": float(psnr(image, truth)), "ssim": float(ssim(image, truth))}
        return metrics, {"img": torch.cat([truth, image], 1), "depth": outputs["depth"]}

    def get_extra_state(self) -> dict[str, Any]:
        """The training state as plain tensors and text, for nerfstudio's checkpoint."""
        if self.state is None:
            return {}
        tensors, text = checkpoint.packed(self.state, {})
        return {"tensors": {name: tensor.detach() for name, tensor in tensors.items()}, "state": text}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The way back."""
        if state:
            self.state, _ = checkpoint.unpacked(state["tensors"], state["state"], "the checkpoint", self.device)


def pinhole(cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """World to camera [C, 4, 4] (OpenCV), K [C, 3, 3] in pixels and times [C] of nerfstudio's cameras."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(cameras), 1, 1)
    c2w[:, :3] = cameras.camera_to_worlds
    viewmats = torch.from_numpy(axes.viewmats(c2w.numpy())).float()
    times = torch.zeros(len(cameras)) if cameras.times is None else cameras.times[:, 0].float()
    return viewmats, cameras.get_intrinsics_matrices().float(), times


def _picture(batch: dict[str, Tensor]) -> Tensor:
    """The image of a batch [H, W, 3] in 0..1."""
    image = batch["image"]
    return image[..., :3].float() / 255 if image.dtype == torch.uint8 else image[..., :3]
