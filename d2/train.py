"""EDM training of a small view and a small frame model, and of the autoencoder that both share.

The networks, their preconditioning and what they are conditioned on are those of `d2 generate`; only the
loss and the optimiser live here.  A step is a function of (seed, step), so a stopped training goes on as if
it had not been stopped, and a longer one continues a shorter one.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2 import fileio
from d2.config import config, load, option, preset_path
from d2.denoiser import UNetDenoiser
from d2.errors import InputError, NumericalError, Stopped
from d2.models.blocks import ResBlock
from d2.models.clip import VisionTransformer
from d2.models.conditioner import Conditioner, Conditioning
from d2.models.patch import PatchFirstStage
from d2.models.unet import VideoTransformer, VideoUNet
from d2.pair import Model, precondition
from d2.phases import Observer
from d2.publish import load_vae, publish
from d2.sequences import Sequences
from d2.settings import GenerateConfig

EVALUATION = 999, 24  # seed and number of the sequences that a training is measured on
EVALUATION_SIGMAS = 0.3, 1.0, 3.0, 10.0, 40.0
WEIGHT_FLOOR = 0.12  # of a pixel that never shows an object, against 1 where one often stands


@config
class TrainConfig(GenerateConfig):
    """How a model is trained; what it is and how its data looks is inherited from the preset of `d2 generate`."""

    steps: int = option(20_000, "gradient steps in all", ge=1, le=100_000_000)
    batch: int = option(4, "sequences a step", ge=1, le=4096)
    lr: float = option(1.5e-3, "learning rate", gt=0, le=1)
    lr_warmup: int = option(100, "steps until the learning rate is reached", ge=1, le=1_000_000)
    lr_decay: float = option(0.5, "share of the steps, at the end, over which it falls to 0", ge=0, le=1)
    weight_decay: float = option(0.01, "AdamW's", ge=0, le=1)
    clip_norm: float = option(1.0, "greatest norm of a step's gradient", gt=0, le=1e6)
    dropout: float = option(0.1, "share of sequences trained without their picture, for guidance", ge=0, le=1)
    log_sigma_mean: float = option(0.9, "of the noise levels trained at, natural logarithm", ge=-10, le=10)
    log_sigma_std: float = option(1.5, "of the noise levels trained at, natural logarithm", gt=0, le=10)
    average: float = option(0.998, "decay a step of the average of the weights, which is what is shipped", ge=0, lt=1)
    checkpoint_every: int = option(500, "steps between two saved states", ge=1, le=1_000_000)
    workers: int = option(0, "threads that draw batches ahead", ge=0, le=64)


class Networks(nn.Module):
    """What is trained together: the UNet, and the network that looks at the reference."""

    def __init__(self, settings: GenerateConfig, model: Model) -> None:
        super().__init__()
        spec = settings.spec(model)
        self.unet = VideoUNet(spec.unet)
        self.conditioner = Conditioner(spec.slots, spec.clip, spec.vae)
        self.conditioner.vae.requires_grad_(False)
        self.settings = settings
        self.model: Model = model

    @property
    def denoiser(self) -> UNetDenoiser:
        return precondition(self.settings, self.model, self.unet)


@dataclass
class State:
    """Everything a training needs to go on."""

    networks: Networks
    average: Networks
    adam: torch.optim.AdamW
    step: int = 0
    loss: float = math.nan  # running mean


def configure(preset: str | Path = "tiny", sets: tuple[str, ...] = ()) -> TrainConfig:
    """A preset of `d2 generate` read as a training's configuration.

    Its `steps` are the sampler's and do not count here.
    """
    fields = fileio.read_yaml(preset_path(preset, "generate"))
    if isinstance(fields, dict):
        fields.pop("steps", None)
    return load(TrainConfig, fields, sets=sets)


def train(
    model: Model,
    settings: TrainConfig,
    data: Sequences,
    held_out: Sequences,
    folder: Path,
    device: torch.device | str = "cpu",
    observer: Observer | None = None,
    should_stop: Callable[[], int] = lambda: 0,
) -> Path:
    """Trains one model to `settings.steps`, from where `folder` left off; returns its checkpoint for `d2 generate`.

    The folder holds the autoencoder (train_vae), the training's state, the checkpoint and a log of PSNR at fixed
    noise levels on `held_out`.  Raises SetupError without the autoencoder, InputError for a state of other
    networks, NumericalError when the loss is not finite (the last saved state stays), Stopped, with everything
    saved, when asked to stop.
    """
    observer = observer or Observer()
    first_stage = load_vae(settings, folder)
    state = _begin(model, settings, first_stage, folder, device)
    weight = _weight_map(data, model, settings).to(device)
    place = folder / f"{settings.spec(model).name}.train.safetensors"

    def save() -> None:
        _save(place, state)
        publish(folder, settings, model, state.average.unet, state.average.conditioner, first_stage)

    for batch in _batches(data, model, settings, state.step):
        loss = _loss(state.networks, batch.pictures.to(device), batch.vector.to(device), weight, settings, state.step)
        if not loss.isfinite():
            raise NumericalError(f"the loss is not finite in step {state.step}; lower lr, then repeat to go on")
        _update(state, loss, settings)
        observer.phase(f"train {model}", state.step, settings.steps)
        stopping = should_stop()
        if stopping or state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
            save()
            _log(folder, model, state, evaluate(state.average, held_out, settings, device))
        if stopping:
            raise Stopped(f"stopped at step {state.step} of {settings.steps}, all saved; repeat to go on", stopping)
    publish(folder, settings, model, state.average.unet, state.average.conditioner, first_stage)
    return folder / settings.spec(model).filename


def _loss(
    networks: Networks,
    pictures: Tensor,  # [B, T, 3, H, W] in -1..1
    vector: Tensor,  # [B, T, A]
    weight: Tensor,  # [h, w], mean 1
    settings: TrainConfig,
    step: int,
) -> Tensor:  # scalar
    """E λ(sigma) |D(z + sigma n) - z|², λ = (sigma² + sigma_data²)/(sigma sigma_data)² (Karras et al. 2022, eq. 8)."""
    c = settings
    generator = torch.Generator().manual_seed(_seed(c.seed, step))
    B, device = len(pictures), pictures.device

    def randn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(device)

    sigma = torch.exp(c.log_sigma_mean + c.log_sigma_std * _stratified_normal(B, generator)).clamp(0.01, 200).to(device)
    reference = pictures[:, -1 if networks.model == "view" else 0]
    cond_aug = c.cond_aug_view if networks.model == "view" else c.cond_aug_frame
    token, latent = networks.conditioner(reference, randn(reference), cond_aug)
    keep = (torch.rand(B, generator=generator) >= c.dropout).float().to(device)
    T = pictures.shape[1]
    cond = Conditioning(
        (token * keep[:, None])[:, None].expand(-1, T, -1),
        (latent * keep[:, None, None, None])[:, None].expand(-1, T, -1, -1, -1),
        vector,
    )
    z = networks.conditioner.vae.mode(pictures.flatten(0, 1)).unflatten(0, (B, T))
    denoiser = networks.denoiser
    estimate = denoiser.estimate(z + sigma[:, None, None, None, None] * randn(z), sigma, denoiser.look(cond))
    per_sequence = (weight * (estimate - z) ** 2).mean((1, 2, 3, 4))
    return ((sigma**2 + c.sigma_data**2) / (sigma * c.sigma_data) ** 2 * per_sequence).mean()


def _update(state: State, loss: Tensor, c: TrainConfig) -> None:
    """One step of AdamW and of the running average."""
    for group in state.adam.param_groups:
        group["lr"] = c.lr * learning_rate(state.step, c)
    state.adam.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.networks.parameters(), c.clip_norm)
    state.adam.step()
    state.step += 1
    state.loss = loss.item() if math.isnan(state.loss) else 0.99 * state.loss + 0.01 * loss.item()
    decay = min(c.average, (1 + state.step) / (20 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.networks.parameters()), 1 - decay)


def learning_rate(step: int, c: TrainConfig) -> float:
    """Warm-up, a plateau, a straight fall to 0: a longer training goes on along the same plateau."""
    rising = (step + 1) / c.lr_warmup
    falling = (c.steps - step) / max(c.lr_decay * c.steps, 1)
    return min(1.0, rising, falling)


@torch.no_grad()
def evaluate(
    networks: Networks, held_out: Sequences, c: TrainConfig, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """PSNR in latent space, dB, of one estimate from each of EVALUATION_SIGMAS."""
    seed, count = EVALUATION
    batch = held_out.batch(networks.model, (seed,), count)
    pictures, reference = batch.pictures.to(device), batch.reference(networks.model).to(device)
    token, latent = networks.conditioner(reference, torch.zeros_like(reference), 0.0)
    B, T = pictures.shape[:2]
    cond = Conditioning(
        token[:, None].expand(-1, T, -1), latent[:, None].expand(-1, T, -1, -1, -1), batch.vector.to(device)
    )
    vae = networks.conditioner.vae
    z = vae.mode(pictures.flatten(0, 1)).unflatten(0, (B, T))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    gain = vae.get_submodule("project").weight.flatten(1).norm(dim=1).mean()  # type: ignore[union-attr]
    denoiser, scores = networks.denoiser, {}
    for sigma in EVALUATION_SIGMAS:
        estimate = denoiser(z + sigma * noise, torch.full((B,), sigma, device=device), cond)
        error = ((estimate - z) / gain / 2).square().sum((2, 3, 4)).mean() / reference[0].numel()  # of 0..1
        scores[f"psnr@{sigma:g}"] = round(float(-10 * torch.log10(error)), 2)
    return scores


def _begin(
    model: Model, settings: TrainConfig, first_stage: PatchFirstStage, folder: Path, device: torch.device | str
) -> State:
    """The saved state, or a fresh one."""
    networks = Networks(settings, model)
    initialise(networks, settings.seed)
    networks.conditioner.vae.load_state_dict(first_stage.encoder.state_dict())
    networks.to(device)
    trained = [p for p in networks.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True)
    state = State(networks, copy.deepcopy(networks).eval().requires_grad_(False), adam)
    place = folder / f"{settings.spec(model).name}.train.safetensors"
    return _load(place, state, device) if place.exists() else state


def initialise(networks: Networks, seed: int) -> None:
    """As the originals were: every branch's last layer at zero, so that the network starts as its skips."""
    torch.manual_seed(seed)
    for module in networks.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.reset_parameters()
        if isinstance(module, VisionTransformer):
            for parameter in (module.class_embedding, module.positional_embedding):
                nn.init.normal_(parameter, std=0.02)
            nn.init.normal_(module.proj, std=module.config.width**-0.5)
        if isinstance(weight := getattr(module, "in_proj_weight", None), nn.Parameter):
            nn.init.xavier_uniform_(weight)
    last = [networks.unet.out[-1]]
    last += [module.out_layers[-1] for module in networks.unet.modules() if isinstance(module, ResBlock)]
    last += [module.proj_out for module in networks.unet.modules() if isinstance(module, VideoTransformer)]
    for layer in last:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def _batches(data: Sequences, model: Model, c: TrainConfig, begin: int) -> Iterator[Any]:
    """The batch of every step that is left, drawn ahead where there are workers."""
    steps = range(begin, c.steps)
    if not c.workers:
        yield from (data.batch(model, (c.seed, step), c.batch) for step in steps)
        return
    with ThreadPoolExecutor(c.workers) as pool:
        ahead = [pool.submit(data.batch, model, (c.seed, step), c.batch) for step in steps[: 2 * c.workers]]
        for step in steps:
            ready = ahead.pop(0)
            if step + 2 * c.workers < c.steps:
                ahead.append(pool.submit(data.batch, model, (c.seed, step + 2 * c.workers), c.batch))
            yield ready.result()


def _weight_map(data: Sequences, model: Model, c: TrainConfig) -> Tensor:  # [h, w], mean 1
    """What a latent pixel's error counts: more where objects often stand."""
    pictures = torch.cat([data.batch(model, (c.seed, 0, number), 16).pictures.flatten(0, 1) for number in range(8)])
    shown = (pictures < 1 - 2 / 255).any(1).float().mean(0)
    weight = WEIGHT_FLOOR + F.avg_pool2d(shown[None, None], c.factor)[0, 0] / shown.max()
    return weight / weight.mean()


def _stratified_normal(count: int, generator: torch.Generator) -> Tensor:  # [count]
    """N(0, 1), one from each of `count` equally likely ranges."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999, 0.999))


def _seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _save(path: Path, state: State) -> None:
    """Weights, their average and the optimiser's moments, whole or not at all."""
    tensors = {f"networks.{name}": t for name, t in state.networks.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in state.average.state_dict().items()}
    for number, moments in state.adam.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": t for name, t in moments.items()}
    fileio.write_tensors(path, tensors, {"step": str(state.step), "loss": repr(state.loss)})


def _load(path: Path, state: State, device: torch.device | str) -> State:
    """Fills a fresh state; raises InputError for one of other networks."""
    tensors, metadata = fileio.read_tensors(path)
    try:
        for name, module in (("networks.", state.networks), ("average.", state.average)):
            module.load_state_dict({k.removeprefix(name): t for k, t in tensors.items() if k.startswith(name)})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, number, name = key.split(".")
                moments.setdefault(int(number), {})[name] = tensor
        groups = state.adam.state_dict()["param_groups"]
        state.adam.load_state_dict({"state": moments, "param_groups": groups})
        state.step, state.loss = int(metadata["step"]), float(metadata["loss"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{fileio.quoted(path)} is not a training of these networks: {reason}") from error
    return state


def _log(folder: Path, model: Model, state: State, scores: dict[str, float]) -> None:
    record = {"step": state.step, "loss": round(state.loss, 5), "time": round(time.time())} | scores
    fileio.append_line(folder / f"train_{model}.jsonl", json.dumps(record))
