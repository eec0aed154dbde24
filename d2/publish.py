"""The autoencoder of a small pair, trained once for both models, and the checkpoints made of trained parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2 import fileio
from d2.errors import InputError, SetupError
from d2.models import weights
from d2.models.patch import PatchConfig, PatchFirstStage, principal_components
from d2.pair import Model
from d2.sequences import Sequences
from d2.settings import GenerateConfig

VAE_NAME = "tiny_vae.safetensors"
BASIS_PICTURES = 64  # sequences that the principal components come from
NOISE = 0.3  # standard deviation, at most, of the noise that the decoder learns to remove
LEARNING_RATE = 2e-3
WARMUP = 50  # steps


def train_vae(
    settings: GenerateConfig,
    data: Sequences,
    folder: Path,
    steps: int,
    batch: int = 4,  # sequences a step
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Path:
    """Principal components of the data's patches, then the decoder, which learns to draw from noisy latents.

    On the CPU; a minute or two.  Raises InputError for a preset whose autoencoder is not of patches.
    """
    config = patch_config(settings)
    torch.manual_seed(settings.seed)
    module = PatchFirstStage(config)
    pictures = torch.cat([_pictures(data, settings, -1 - n, 4) for n in range(BASIS_PICTURES // 4)])
    module.set_basis(*principal_components(pictures, config))
    module.decoder.expand.requires_grad_(False)  # stays the encoder's transpose; the rest learns to correct it
    adam = torch.optim.AdamW([p for p in module.decoder.parameters() if p.requires_grad], LEARNING_RATE)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP, 2 * (steps - step) / steps)
        loss = _loss(module, _pictures(data, settings, step, batch))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.decoder.parameters(), 1.0)
        adam.step()
        progress("train vae", step + 1, steps)
    path = folder / VAE_NAME
    fileio.write_tensors(path, {weights.PREFIX["first_stage"] + k: t for k, t in module.state_dict().items()})
    return path


def load_vae(settings: GenerateConfig, folder: Path) -> PatchFirstStage:
    """What `train_vae` wrote; raises SetupError without it."""
    path = folder / VAE_NAME
    if not path.is_file():
        raise SetupError(f"{fileio.quoted(path)} does not exist; train the autoencoder first: d2 train vae")
    tensors, _ = fileio.read_tensors(path)
    module = PatchFirstStage(patch_config(settings))
    try:
        module.load_state_dict({k.removeprefix(weights.PREFIX["first_stage"]): t.float() for k, t in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"{fileio.quoted(path)} is not the autoencoder of this preset") from error
    return module.eval().requires_grad_(False)


def publish(
    folder: Path,
    settings: GenerateConfig,
    model: Model,
    unet: nn.Module,
    conditioner: nn.Module,
    first_stage: nn.Module,
) -> Path:
    """One checkpoint in float16, laid out as the official ones are."""
    spec = settings.spec(model)
    parts = {"unet": unet, "conditioner": conditioner, "first_stage": first_stage}
    tensors = {
        weights.PREFIX[part] + name: tensor.half()  # type: ignore[index]
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    path = folder / spec.filename
    fileio.write_tensors(path, tensors, {"licence": settings.licence})
    weights.check(path, spec)
    return path


def patch_config(settings: GenerateConfig) -> PatchConfig:
    """The autoencoder's configuration; raises InputError for another kind."""
    config = settings.spec("view").vae
    if not isinstance(config, PatchConfig):
        raise InputError("training needs a preset with autoencoder: patch; Stable Diffusion's is not trained here")
    return config


def _pictures(data: Sequences, c: GenerateConfig, step: int, size: int) -> Tensor:  # [N, 3, H, W] in -1..1
    models: tuple[Model, Model] = "view", "frame"
    return data.batch(models[step % 2], (c.seed, 1, step % 2**31), size).pictures.flatten(0, 1)


def _loss(module: PatchFirstStage, pictures: Tensor) -> Tensor:
    """Absolute error of the picture and of its gradients, from latents of every noise level up to NOISE."""
    z = module.encoder.mode(pictures)
    z = z + NOISE * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
    drawn = module.decoder(z)
    edges = sum(F.l1_loss(drawn.diff(dim=d), pictures.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(drawn, pictures) + edges
