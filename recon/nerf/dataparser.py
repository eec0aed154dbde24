"""The dataparser `d2-data`: any dataset that `d2 reconstruct` reads, in nerfstudio, with the time of every image."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from d2.recon import dataset, train
from d2.recon.config import ReconstructConfig


@dataclass
class D2DataParserConfig(DataParserConfig):
    """Where the images are and which of them are for evaluation."""

    _target: type = field(default_factory=lambda: D2DataParser)
    data: Path = Path("runs/asset")
    """A run folder of d2, or any folder with transforms.json (nerfstudio, Blender, D-NeRF)."""
    holdout: int = 12
    """Images kept for evaluation where there is no transforms_test.json; at most a tenth."""


class D2DataParser(DataParser):
    """Cameras as the file says them: nothing is centred, scaled or turned, so that models fit d2's other tools."""

    config: D2DataParserConfig
    includes_time = True

    def cells(self, size: int | None = None) -> dataset.Dataset:
        """The training images as d2's trainer takes them; `size` as in `dataset.load`."""
        cells = dataset.load(self.config.data, size=size)
        return cells.subset(self._chosen(len(cells), "train"))

    def _generate_dataparser_outputs(self, split: str = "train", **_) -> DataparserOutputs:
        """Of split "train", "val" or "test".  Raises InputError for what `dataset.load` refuses."""
        shots = dataset.shots(self.config.data, "test" if self._has_test_file() and split != "train" else "train")
        shots = [shots[k] for k in self._chosen(len(shots), split).tolist()]
        K = torch.from_numpy(np.stack([shot.K for shot in shots])).float()
        cameras = Cameras(
            camera_to_worlds=torch.from_numpy(np.stack([shot.c2w[:3] for shot in shots])).float(),
            fx=K[:, 0, 0], fy=K[:, 1, 1], cx=K[:, 0, 2], cy=K[:, 1, 2],
            width=torch.tensor([shot.width for shot in shots]), height=torch.tensor([shot.height for shot in shots]),
            camera_type=CameraType.PERSPECTIVE, times=torch.tensor([shot.time for shot in shots]),
        )  # fmt: skip
        masks = [shot.mask for shot in shots if shot.mask is not None]
        return DataparserOutputs(
            image_filenames=[shot.image for shot in shots],
            cameras=cameras,
            alpha_color=torch.ones(3),
            mask_filenames=masks if len(masks) == len(shots) else None,
        )

    def _has_test_file(self) -> bool:
        return dataset.find_transforms(self.config.data, "test").name == "transforms_test.json"

    def _chosen(self, count: int, split: str) -> torch.Tensor:
        """Indices of a split's images within their file: those that `d2 reconstruct` trains on, or holds out."""
        if self._has_test_file():
            return torch.arange(count)
        kept, held_out = train.holdout_indices(count, ReconstructConfig(holdout=self.config.holdout))
        return kept if split == "train" else held_out


specification = DataParserSpecification(
    config=D2DataParserConfig(), description="d2 run folders and transforms.json with the time of every image"
)
