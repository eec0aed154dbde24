"""The autoencoder as the matrix needs it: picture by picture, in float32, from and to the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2.models.patch import PatchFirstStage
from d2.models.vae import FirstStage


class Stage:
    """An autoencoder in float32; latents and pictures come and go on the CPU.

    Views are no clip (`apart`): a decoder that looks along time gets them one by one.
    """

    def __init__(self, module: FirstStage | PatchFirstStage, device: torch.device, apart: bool) -> None:
        self.module, self.device = module, device
        self.apart = apart and isinstance(module, FirstStage) and module.video

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,  # [T, C, h, w], as sampled
        chunk: int,  # pictures at a time
    ) -> Tensor:  # [T, 3, H, W] in 0..1
        """Pictures of one line."""
        pictures = self.module.decode(latents.to(self.device), 1 if self.apart else chunk)
        return ((pictures.float().cpu() + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def encode(
        self,
        pictures: Tensor,  # [N, 3, H, W] in -1..1
        noise: Callable[[int], Tensor],  # picture -> [C, h, w], N(0, 1)
    ) -> Tensor:  # [N, C, h, w]
        """Latents drawn from the encoder's distribution, as sampled ones."""
        encoded = [
            self.module.encode(picture[None].to(self.device), noise(number)[None].to(self.device))
            for number, picture in enumerate(pictures)
        ]
        return torch.cat(encoded).cpu()
