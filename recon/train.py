"""Fitting 4D Gaussians to a dataset: (state, step) -> state, deterministic, resumable, knows no files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from d2.errors import NumericalError, SetupError
from d2.recon import corrections, densify, hull, objective
from d2.recon.config import ReconstructConfig
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.metrics import psnr
from d2.recon.perceptual import LPIPS, load_lpips
from d2.recon.raster import image_plane_gradient, rasterize

ADAM_EPS = 1e-15
COARSE_FROM = 192  # pixels of the longer side; at 128 a half resolution saves no time and costs 0.2 dB
AVERAGE_EVERY = 10  # steps between two samples of the model's average
CHECK_EVERY = 100  # steps between two looks at whether everything is finite
LEARNED = {
    "means": "lr_means", "velocities": "lr_velocities", "times": "lr_times", "log_durations": "lr_durations",
    "quats": "lr_quats", "log_scales": "lr_scales", "opacity_logits": "lr_opacities", "sh": "lr_sh",
}  # fmt: skip
SCALED_WITH_SCENE = ("means", "velocities")


class LearnedRig(Protocol):
    """Cameras that are learned with the model: see d2.recon.rig."""

    def viewmats(self, data: Dataset, cells: Tensor) -> Tensor: ...

    def prior(self, loss: Tensor) -> Tensor: ...

    def step(self, decay: float) -> None: ...


class Progress(NamedTuple):
    """What the callback sees after every step."""

    iteration: int
    fraction: float  # of the run, 0..1
    loss: Tensor  # scalar; reading it waits for the device
    gaussians: int
    validated: bool  # whether this step validated
    psnr: float | None  # dB on the held-out cells, where it did and there are any
    is_best: bool


@dataclass
class State:
    """Everything a run is at one step; tensors only, so that it fits one file."""

    gaussians: Gaussians4D
    adam: torch.optim.Adam
    stats: densify.GradientStats
    half_side: float  # world; what learning rates of positions scale with
    corrections: corrections.Corrections | None = None
    rig: LearnedRig | None = None
    lpips: LPIPS | None = None  # the network, where the loss has it
    average: Gaussians4D | None = None  # over the last steps, once the number of Gaussians is settled
    iteration: int = 0
    best: Gaussians4D | None = None
    best_psnr: float | None = None  # dB; None before the first validation, or without held-out cells
    seconds: dict[str, float] = field(default_factory=dict)  # spent so far, by part

    @property
    def model(self) -> Gaussians4D:
        """What the run would give if it ended now: the average where there is one."""
        return self.gaussians if self.average is None else self.average


def start(dataset: Dataset, config: ReconstructConfig, device: torch.device | str) -> State:
    """The initial state, from the visual hull."""
    train, _ = holdout_split(dataset, config)
    centre, half_side = hull.scene_box(dataset)
    gaussians = hull.initialise(
        train,
        min(config.start_gaussians, config.max_gaussians),
        config.start_duration,
        config.sh_degree,
        config.seed,
    )
    state = state_of(gaussians.map(lambda x: x.to(device)), half_side)
    state.corrections = corrections.Corrections.start(
        train, config, torch.from_numpy(centre).float().to(device), half_side
    )
    equip(state, config)
    return state


def equip(state: State, config: ReconstructConfig) -> None:
    """Gives the state the network of its loss, which no checkpoint holds. Raises InputError, SetupError."""
    if not config.lpips_weight:
        return
    if not config.lpips:
        raise SetupError("lpips_weight needs the weights of LPIPS; give their file: --set lpips=FILE")
    state.lpips = load_lpips(config.lpips).to(state.gaussians.means.device).requires_grad_(False)


def state_of(gaussians: Gaussians4D, half_side: float) -> State:
    """A fresh state around given Gaussians."""
    gaussians = gaussians.map(lambda x: x.detach().clone().requires_grad_())
    groups = [{"params": [tensor], "name": name} for name, tensor in gaussians.tensors().items()]
    adam = torch.optim.Adam(groups, lr=0.0, eps=ADAM_EPS, fused=True)
    return State(gaussians, adam, densify.GradientStats(len(gaussians), gaussians.means.device), half_side)


def fit(
    state: State,
    dataset: Dataset,
    config: ReconstructConfig,
    callback: Callable[[State, Progress], None] = lambda state, progress: None,
    seconds: float | None = None,
) -> Gaussians4D:
    """Runs until `config.iterations`, or for `seconds` of this loop if given, and returns the best model.

    Raises NumericalError when loss or parameters leave the finite numbers; `state.best` is then the last good one.
    """
    train, held_out = holdout_split(dataset, config)
    coarse = coarse_cells(train, config)
    begin = time.perf_counter()
    while True:
        elapsed = time.perf_counter() - begin
        fraction = state.iteration / config.iterations if seconds is None else elapsed / seconds
        if fraction >= 1:
            break
        loss = step(state, coarse if fraction < config.coarse_until else train, config, fraction)
        last = seconds is None and state.iteration == config.iterations
        validates, quality, is_best = False, None, False
        if state.iteration % config.validate_every == 0 or last:
            require_finite(state, float(loss))
            validates, (quality, is_best) = True, validate(state, held_out, config)
        elif state.iteration % CHECK_EVERY == 0:
            require_finite(state, float(loss))
        callback(state, Progress(state.iteration, fraction, loss, len(state.gaussians), validates, quality, is_best))
    if seconds is not None or state.best is None:
        require_finite(state, 0.0)
        validate(state, held_out, config)
    assert state.best is not None
    return state.best


def step(state: State, train: Dataset, config: ReconstructConfig, fraction: float) -> Tensor:
    """One optimisation step on `config.pairs` cells; returns the loss."""
    clock = _Clock(state.seconds)
    cells = cells_of_step(len(train), config.pairs, config.seed, state.iteration)
    generator = torch.Generator().manual_seed(_mix(config.seed, 1, state.iteration))
    background = torch.rand(3, generator=generator) if train.has_alpha else train.background
    background = background.to(train.images.device)
    corrects = state.corrections if fraction >= config.correct_from else None
    images, alphas, meta = _draw(state, train, cells, config, corrects)
    clock("forward")
    losses = [
        objective.picture_loss(image, alpha[..., 0], train, cell, background, config, state.lpips)
        for image, alpha, cell in zip(images, alphas, cells.tolist(), strict=True)
    ]
    misfit = torch.stack(losses).mean()
    loss = misfit + objective.priors(state.gaussians, state.half_side, misfit, fraction, config)
    if state.rig is not None:
        loss = loss + state.rig.prior(misfit)
    clock("loss")
    loss.backward()
    clock("backward")
    _set_learning_rates(state, config, fraction)
    state.adam.step()
    state.adam.zero_grad()
    if state.rig is not None:
        state.rig.step(config.lr_end ** min(1.0, fraction))
    if config.min_scale:
        pixel = 2 * state.half_side / max(train.width, train.height)
        state.gaussians.log_scales.data.clamp_(min=math.log(config.min_scale * pixel))
    clock("adam")
    state.iteration += 1
    if fraction < config.grow_until:
        state.stats.add(image_plane_gradient(meta), max(train.width, train.height))
        if state.iteration % config.grow_every == 0 and fraction > config.grow_from:
            prune_and_grow(state, config, fraction)
        if config.opacity_reset_every and state.iteration % config.opacity_reset_every == 0:
            reset_opacities(state, 2 * config.prune_opacity)
    elif config.average_over and fraction >= config.average_from and state.iteration % AVERAGE_EVERY == 0:
        take_average(state, AVERAGE_EVERY / config.average_over)
    clock("densify")
    return loss.detach()


def coarse_cells(train: Dataset, config: ReconstructConfig) -> Dataset:
    """What is trained on until `config.coarse_until`: half the resolution, where the images are large."""
    is_large = max(train.width, train.height) >= COARSE_FROM
    return train.halved() if config.coarse_until and is_large else train


def _draw(
    state: State, train: Dataset, cells: Tensor, config: ReconstructConfig, learned: corrections.Corrections | None
):
    """Images [C, H, W, 3], alphas [C, H, W, 1] and meta: the cells as cameras, times and their corrections say."""
    viewmats = train.viewmats[cells] if state.rig is None else state.rig.viewmats(train, cells)
    times = train.times[cells]
    found = []
    if learned is not None:
        found = [learned.of_picture(k, train) for k in cells.tolist()]
        cameras = [learned.camera(k, correction, train) for k, correction in zip(cells.tolist(), found, strict=True)]
        viewmats, times = torch.stack([c[0] for c in cameras]), torch.stack([c[1] for c in cameras])
    gaussians, motion = state.gaussians.activated(times)
    images, alphas, meta = rasterize(
        **gaussians, viewmats=viewmats, Ks=train.Ks[cells], width=train.width, height=train.height,
        sh_degree=config.sh_degree, motion=motion,
        rasterize_mode="antialiased" if config.antialiased else "classic",
    )  # fmt: skip
    if learned is None:
        return images, alphas, meta
    mapped = []
    for k, correction, image, alpha in zip(cells.tolist(), found, images, alphas, strict=True):
        if corrections.is_due(state.iteration * config.pairs // len(train)):
            learned.visit(k, correction, image.detach(), alpha.detach(), train, state.gaussians)
            correction = learned.of_picture(k, train)
        mapped.append(corrections.corrected(torch.cat([image, alpha], -1), correction))
    layers = torch.stack(mapped)
    return layers[..., :3], layers[..., 3:], meta


@torch.no_grad()
def take_average(state: State, share: float) -> None:
    """Moves the average by `share` towards the model as it is; noise of single steps averages out (Polyak 1992)."""
    if state.average is None:
        state.average = state.gaussians.map(lambda x: x.detach().clone())
    for name, tensor in state.average.tensors().items():
        tensor.lerp_(getattr(state.gaussians, name).detach(), share)


def prune_and_grow(state: State, config: ReconstructConfig, fraction: float) -> None:
    """Drops what is faint, overgrown or unseen, then doubles the Gaussians with the largest image-plane gradients.

    The number follows a straight line from start_gaussians to max_gaussians over the growing phase.
    """
    with torch.no_grad():
        keep = densify.keep_mask(state.gaussians, state.stats, config.prune_opacity, state.half_side)
        if not keep.any():
            raise NumericalError(f"every Gaussian was pruned at iteration {state.iteration}; lower prune_opacity")
        kept = keep.nonzero()[:, 0]
        gaussians = state.gaussians.map(lambda x: x.detach()[kept])
        done = (fraction - config.grow_from) / max(config.grow_until - config.grow_from, 1e-9)
        span = config.max_gaussians - min(config.start_gaussians, config.max_gaussians)
        target = config.max_gaussians - round(span * (1 - min(1.0, max(0.0, done))))
        chosen = densify.choose(state.stats.mean()[kept], max(0, target - len(kept)))
        generator = torch.Generator().manual_seed(_mix(config.seed, 2, state.iteration))
        gaussians, source = densify.grow(gaussians, chosen, state.half_side, generator)
        replace_gaussians(state, gaussians, kept[source])


def reset_opacities(state: State, most: float) -> None:
    """Makes every Gaussian at most this opaque, so that those that no picture asks for stay faint and are pruned."""
    group = next(group for group in state.adam.param_groups if group["name"] == "opacity_logits")
    logits = group["params"][0]
    logits.data.clamp_(max=math.log(most / (1 - most)))
    for key in ("exp_avg", "exp_avg_sq"):
        if logits in state.adam.state:
            state.adam.state[logits][key].zero_()


def replace_gaussians(state: State, gaussians: Gaussians4D, source: Tensor) -> None:
    """Puts new parameters in; Adam's moments follow from `source` [N], the old index of each."""
    for group, tensor in zip(state.adam.param_groups, gaussians.tensors().values(), strict=True):
        old = group["params"][0]
        moments = state.adam.state.pop(old, None)
        new = tensor.detach().clone().requires_grad_()
        if moments:
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = moments[key][source].clone()
            state.adam.state[new] = moments
        group["params"] = [new]
    state.gaussians = Gaussians4D(**{group["name"]: group["params"][0] for group in state.adam.param_groups})
    state.stats = densify.GradientStats(len(gaussians), gaussians.means.device)


def validate(state: State, held_out: Dataset, config: ReconstructConfig) -> tuple[float | None, bool]:
    """Mean PSNR over the held-out cells; keeps the model when it is the best so far (or there are none)."""
    model = state.model
    quality = evaluate_psnr(model, held_out, config) if len(held_out) else None
    is_best = state.best is None or quality is None or state.best_psnr is None or quality > state.best_psnr
    if is_best:
        state.best, state.best_psnr = model.map(lambda x: x.detach().clone()), quality
    return quality, is_best


@torch.no_grad()
def evaluate_psnr(gaussians: Gaussians4D, cells: Dataset, config: ReconstructConfig) -> float:
    """Mean PSNR in dB over cells, on white (or on the dataset's background where there is no alpha)."""
    values = []
    for k in range(len(cells)):
        picture = draw_cell(gaussians, cells, k, config.antialiased)
        truth = cells.images[k].float() / 255
        truth = truth[..., :3] + (1 - truth[..., 3:]) * cells.background
        values.append(psnr(picture, truth))
    return sum(values) / len(values)


def draw_cell(gaussians: Gaussians4D, cells: Dataset, k: int, antialiased: bool = False) -> Tensor:
    """The picture [H, W, 3] that the model gives of one cell, on the dataset's background."""
    arguments, motion = gaussians.activated(cells.times[k : k + 1])
    image, _, _ = rasterize(
        **arguments, viewmats=cells.viewmats[k : k + 1], Ks=cells.Ks[k : k + 1], width=cells.width, height=cells.height,
        sh_degree=gaussians.sh_degree, motion=motion, backgrounds=cells.background[None],
        rasterize_mode="antialiased" if antialiased else "classic",
    )  # fmt: skip
    return image[0]


def require_finite(state: State, loss: float) -> None:
    """Raises NumericalError naming what is not finite."""
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NumericalError(f"the loss is {loss} at iteration {state.iteration}; lower the learning rates")
    for name, tensor in state.gaussians.tensors().items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{name} is not finite at iteration {state.iteration}; lower the learning rates")


def holdout_split(dataset: Dataset, config: ReconstructConfig) -> tuple[Dataset, Dataset]:
    """Training cells and held-out cells; at most a tenth is held out, chosen by the seed."""
    kept, held_out = holdout_indices(len(dataset), config)
    return dataset.subset(kept), dataset.subset(held_out)


def holdout_indices(cells: int, config: ReconstructConfig) -> tuple[Tensor, Tensor]:
    """Which of so many cells are trained on and which are held out, both in ascending order."""
    count = min(config.holdout, cells // 10)
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(_mix(config.seed, 3, 0)))
    return order[count:].sort().values, order[:count].sort().values


def cells_of_step(count: int, pairs: int, seed: int, iteration: int) -> Tensor:
    """Indices [pairs] of a step: every epoch is a fresh permutation, a function of (seed, step) alone."""
    positions = torch.arange(iteration * pairs, (iteration + 1) * pairs)
    return torch.stack([_permutation(count, seed, int(p) // count)[int(p) % count] for p in positions])


_last_permutation: tuple[tuple[int, int, int], Tensor] | None = None


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    global _last_permutation
    if _last_permutation is None or _last_permutation[0] != (count, seed, epoch):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, 4, epoch)))
        _last_permutation = (count, seed, epoch), order
    return _last_permutation[1]


def _mix(seed: int, stream: int, counter: int) -> int:
    """One 63-bit seed for each (seed, stream, counter)."""
    value = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + counter * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) % 2**63


def _set_learning_rates(state: State, config: ReconstructConfig, fraction: float) -> None:
    decay = config.lr_end ** min(1.0, fraction)
    for group in state.adam.param_groups:
        rate = getattr(config, LEARNED[group["name"]]) * decay
        group["lr"] = rate * state.half_side if group["name"] in SCALED_WITH_SCENE else rate


class _Clock:
    """Adds the time since the last call to a named part."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.last = seconds, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
