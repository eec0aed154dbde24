"""The method `d2-4dgs`: nerfstudio's trainer, data manager and viewer around d2's model."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from d2 import fileio
from d2.errors import InputError
from d2.recon.nerf.checkpoints import METHOD, TIMESTAMP, model_file
from d2.recon.nerf.dataparser import D2DataParser, D2DataParserConfig
from d2.recon.nerf.model import D2Model, D2ModelConfig
from d2.run import Run, is_run


class D2Datamanager(FullImageDatamanager):
    """Pictures for the viewer and for evaluation; training reads its own."""

    def __init__(self, config: FullImageDatamanagerConfig, **options) -> None:
        super().__init__(config, **options)
        if not torch.cuda.is_available():
            self.config.cache_images = "gpu"  # "cpu", chosen for many images, pins memory: that takes CUDA

    def get_train_rays_per_batch(self) -> int:
        """Pixels of a step."""
        cameras = self.train_dataset.cameras
        return int(cameras.width[0] * cameras.height[0])


class D2Pipeline(VanillaPipeline):
    """Starts the model from the training images, where it is going to be trained."""

    datamanager: D2Datamanager
    model: D2Model

    def __init__(self, config: VanillaPipelineConfig, device: str, test_mode: str = "val", **options) -> None:
        super().__init__(config, device, test_mode, **options)
        if test_mode != "val":
            return
        parser, path = self.datamanager.dataparser, Path(self.datamanager.get_datapath())
        if not isinstance(parser, D2DataParser):
            raise InputError("d2-4dgs reads its images through its own dataparser; leave it out or say d2-data")
        cells = parser.cells(self.model.settings.size or None)
        rate = {"fps": f"{Run.open(path).fps:g}"} if is_run(path) else {}
        self.model.begin(cells, path, {"frames": str(cells.frames)} | rate)


class D2Trainer(Trainer):
    """Leaves the step to d2's trainer, and writes the model beside nerfstudio's checkpoint, for d2 to read."""

    pipeline: D2Pipeline

    def train_iteration(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Loss, loss by part, metrics."""
        loss = self.pipeline.model.fit_step(self.config.max_num_iterations)
        return loss, {"loss": loss}, {"gaussians": torch.tensor(len(self.pipeline.model.gaussians))}

    def save_checkpoint(self, step: int) -> None:
        """step-N.safetensors holds the 4D Gaussians alone, step-N.ckpt what resuming takes."""
        super().save_checkpoint(step)
        model, mine = self.pipeline.model, model_file(self.checkpoint_dir, step)
        model.gaussians.save(mine, model.metadata)
        for other in self.checkpoint_dir.glob(model_file(Path(), "*").name):
            if other != mine and not other.with_suffix(".ckpt").exists():
                fileio.remove(other)


def configuration() -> TrainerConfig:
    """What `ns-train d2-4dgs` starts from; on the GPU where there is one."""
    return D2TrainerConfig(
        method_name=METHOD,
        steps_per_eval_batch=0,
        steps_per_eval_image=500,
        steps_per_eval_all_images=5000,
        steps_per_save=2000,
        max_num_iterations=20000,
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        pipeline=VanillaPipelineConfig(
            _target=D2Pipeline,
            datamanager=FullImageDatamanagerConfig(_target=D2Datamanager, dataparser=D2DataParserConfig()),
            model=D2ModelConfig(),
        ),
        optimizers={},
        viewer=ViewerConfig(websocket_host="127.0.0.1"),
        vis="viewer",
    )


def of_export(folder: str, data: str) -> TrainerConfig:
    """The configuration of a model that `d2 export --format nerfstudio` wrote into `folder`: its config.yml."""
    config, place = configuration(), Path(folder)
    config.output_dir, config.experiment_name, config.timestamp = place.parent, place.name, TIMESTAMP
    config.data = config.pipeline.datamanager.data = Path(data)
    return config


@dataclass
class D2TrainerConfig(TrainerConfig):
    """nerfstudio's fields, with d2's trainer."""

    _target: type = field(default_factory=lambda: D2Trainer)


specification = MethodSpecification(
    config=configuration(), description="4D Gaussians of d2: moving objects from views at every moment, on CPU and CUDA"
)
