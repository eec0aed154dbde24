"""The joint loop: from noise to the V×F matrix of latents, composing both models at every noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from d2.compose import Unconditional, Weights, compose, needed, weights
from d2.config import config, option
from d2.denoiser import Estimate, MatrixDenoiser, in_turn
from d2.errors import InputError, NumericalError
from d2.models.blocks import Blend
from d2.noise import freeinit_noise, starting_point
from d2.schedule import (
    Composition,
    Filter,
    composition_scale,
    edm_sigmas,
    frame_share,
    linear_guidance,
    low_pass,
    progress,
    triangle_guidance,
    warmed_up,
)

Method = Literal["euler", "heun", "dpmpp2m"]
Together = Callable[
    [MatrixDenoiser | None, MatrixDenoiser | None, Tensor, float], tuple[Estimate | None, Estimate | None]
]
Noise = Callable[[int], Tensor]  # step -> [V, F, C, h, w], N(0, 1)


@config
class SamplerConfig:
    """How a matrix is sampled; the defaults are the reference's."""

    steps: int = option(50, "noise levels", ge=1, le=1000)
    method: Method = option("euler", "how a step is taken: euler (1st order), heun or dpmpp2m (2nd order)")
    sigma_min: float = option(0.002, "last noise level before 0", gt=0)
    sigma_max: float = option(700.0, "first noise level", gt=0, le=1e5)
    rho: float = option(7.0, "how much the levels crowd towards 0", ge=1, le=100)
    vrs: Literal["reference", "exact", "off"] = option(
        "reference",
        "noise put back after an early step, which is then taken again: as the reference does, "
        "with the exact variance, or none",
    )
    vrs_steps: int = option(10, "how many steps, from the first, are taken twice", ge=0, le=1000)
    composition: Composition = option("constant", "how the view model's weight runs over the steps")
    scale: float = option(0.6, "weight of a constant schedule; midpoint of a logistic one", ge=0, le=1)
    scale_min: float = option(0.0, "weight at the end of a falling schedule", ge=0, le=1)
    scale_max: float = option(1.0, "weight at the start of a falling schedule", ge=0, le=1)
    scale_k: float = option(15.0, "steepness of a logistic schedule", gt=0, le=1000)
    svd_only_from: float | None = option(None, "progress 0..1 after which the frame model alone counts", ge=-1, le=1)
    uc_type: Unconditional = option("default", "whose unconditional estimate both models use")
    svd_cfg_warmup: bool = option(False, "let the frame model's guidance rise from 1 over the steps")
    view_guidance_min: float = option(2.5, "guidance at the input view", ge=0, le=100)
    view_guidance_max: float = option(2.5, "guidance at the view opposite", ge=0, le=100)
    frame_guidance_min: float = option(1.5, "guidance of the first frame", ge=0, le=100)
    frame_guidance_max: float = option(3.0, "guidance of the last frame", ge=0, le=100)
    guidance_skip: float = option(
        0.0, "guidance within this of 1 counts as 1, and the unconditional estimate is not computed", ge=0, le=100
    )
    step_cache: int = option(
        1,
        "the networks are computed whole at each n-th noise level, between them all but their last stage is reused: "
        "faster and less exact, as fewer steps are; takes memory for every cell (--dry-run)",
        ge=1,
        le=100,
    )
    anchor_frame: int = option(0, "input frame that the views are sampled from; -1 is the last one")
    noise_from_mv: bool = option(False, "start around the reference views' latents instead of around 0")
    conv_blend: float | None = option(
        None, "weight of its own frame in the view model's attention; the rest is its neighbours'", ge=0, le=1
    )
    conv_blend_padding: Literal["replicate", "reference"] = option(
        "replicate",
        "what stands beside the first and the last frame: themselves, or zeros as in the reference",
    )
    freeinit_references: int = option(1, "how often the references are sampled (FreeInit)", ge=1, le=10)
    freeinit_matrix: int = option(1, "how often the matrix is sampled (FreeInit)", ge=1, le=10)
    freeinit_filter: Filter = option("butterworth", "which low frequencies are kept from one time to the next")
    freeinit_order: int = option(4, "order of the Butterworth filter", ge=1, le=20)
    freeinit_stop_space: float = option(0.25, "stop frequency over height and width, 1 = Nyquist", ge=0, le=1)
    freeinit_stop_time: float = option(0.25, "stop frequency over views and frames", ge=0, le=1)


class Plan(NamedTuple):
    """A configuration worked out for one matrix: everything the loop reads."""

    config: SamplerConfig
    sigmas: Tensor  # [steps + 1], the last one 0
    share: Tensor  # [V], the frame model's
    view_guidance: Tensor  # [V]
    frame_guidance: Tensor  # [F]

    def weights(self, step: int) -> Weights:
        """What each model counts in a step."""
        c, q = self.config, progress(step, self.config.steps)
        scale = composition_scale(c.composition, q, c.scale, c.scale_min, c.scale_max, c.scale_k)
        return weights(self.share, scale, c.svd_only_from is not None and q > c.svd_only_from)

    def frame_guidance_at(self, step: int) -> Tensor:  # [F]
        c = self.config
        return warmed_up(self.frame_guidance, step, c.steps) if c.svd_cfg_warmup else self.frame_guidance

    def guided_from(self, model: Literal["view", "frame"]) -> float:
        """The highest noise level at which a model's unconditional estimate is used; 0 where it never is.

        At a guidance of 1 it drops out; a guidance that warms up only moves away from 1.
        """
        if self.config.uc_type != "default":
            return math.inf
        for step, sigma in enumerate(self.sigmas[:-1].tolist()):
            guidance = self.view_guidance if model == "view" else self.frame_guidance_at(step)
            if (guidance - 1).abs().max() > self.config.guidance_skip:
                return sigma if step else math.inf
        return 0.0

    def shallow_at(self, model: Literal["view", "frame"]) -> tuple[float, ...]:
        """Noise levels at which a model reuses its deep features: a function of the level alone, for any rank.

        Whole are every `step_cache`-th, the first that is guided, and those around a change of the models needed,
        where lines may move to another rank.
        """
        c, levels, guided = self.config, self.sigmas[:-1].tolist(), self.guided_from(model)
        use = [needed(self.weights(step), c.uc_type) for step in range(c.steps)]
        return tuple(
            sigma
            for step, sigma in enumerate(levels)
            if step % c.step_cache and sigma != guided and len(set(use[step - 1 : step + 2])) == 1
        )

    def resumable(self, step: int) -> bool:
        """Whether nothing that an earlier step left in memory is needed from here on."""
        return step % self.config.step_cache == 0 or step == self.config.steps

    def passes(self, step: int) -> int:
        """How often a step is taken."""
        return 2 if self.config.vrs != "off" and step < self.config.vrs_steps else 1

    def start(
        self,
        noise: Tensor,  # [V, F, C, h, w], N(0, 1)
        latents: Tensor,  # [V, C, h, w], sampled latents of the reference views
    ) -> State:
        """Noise at the first level, around the reference views where `noise_from_mv` asks for it."""
        around = latents[:, None] if self.config.noise_from_mv else None
        return State(starting_point(noise, self.sigmas[0].item(), around))

    def low_pass(
        self,
        h: int,  # of a latent
        w: int,
    ) -> Tensor:  # [V, F, h, w]
        """The filter of FreeInit over the matrix; one row or column is filtered as the sequence it is."""
        c, V, F = self.config, len(self.share), len(self.frame_guidance)
        shape = [n for n in (V, F) if n > 1] + [h, w]
        stops = c.freeinit_stop_space, c.freeinit_stop_time
        return low_pass(shape, c.freeinit_filter, c.freeinit_order, *stops).view(V, F, h, w)


class State(NamedTuple):
    """Where the loop stands; with the noise a function of the step it is all that resuming needs."""

    x: Tensor  # [V, F, C, h, w], float32
    step: int = 0
    again: int = 0  # how often this step has been taken and undone
    previous: Tensor | None = None  # the last estimate, like x: what dpmpp2m remembers


def plan(
    config: SamplerConfig,
    azimuth: Tensor,  # [V] rad, 0 at the input view
    F: int,
) -> Plan:
    """Works out the schedules for V views and F frames; raises InputError for levels that do not fall."""
    c = config
    if c.sigma_min >= c.sigma_max:
        raise InputError(f"sigma_min {c.sigma_min} must be less than sigma_max {c.sigma_max}")
    return Plan(
        c,
        edm_sigmas(c.steps, c.sigma_min, c.sigma_max, c.rho),
        frame_share(azimuth.double()).float(),
        triangle_guidance(c.view_guidance_min, c.view_guidance_max, len(azimuth)),
        linear_guidance(c.frame_guidance_min, c.frame_guidance_max, F),
    )


def alone(config: SamplerConfig, model: Literal["view", "frame"]) -> SamplerConfig:
    """The same settings for one model without the other and without renoising: phase 1, and the ablation."""
    only = {"scale": 1.0, "svd_only_from": None if model == "view" else -1.0}
    return replace(config, composition="constant", uc_type="default", vrs="off", svd_cfg_warmup=False, **only)


def blend(config: SamplerConfig, F: int) -> Blend | None:
    """How the view model's F columns, all of them in flight, look at each other in phase 2."""
    if config.conv_blend is None:
        return None
    return Blend(config.conv_blend, 2, config.conv_blend_padding, columns=F)


def anchor(config: SamplerConfig, F: int) -> int:
    """Which of F input frames the views are sampled from, and in which column they therefore stand.

    Raises InputError when there is no such frame.
    """
    if not -F <= config.anchor_frame < F:
        raise InputError(f"anchor_frame {config.anchor_frame}: expected {-F} to {F - 1} for {F} frames")
    return config.anchor_frame % F


def sample_matrix(
    state: State,
    plan: Plan,
    views: MatrixDenoiser | None,  # every column; None where its weight is 0 throughout
    frames: MatrixDenoiser | None,  # every row
    noise: Noise,  # for putting noise back after a step
    callback: Callable[[State], None] = lambda state: None,
    together: Together = in_turn,
) -> Tensor:  # [V, F, C, h, w]
    """Runs the loop to the end; `callback` sees every state, and may raise to stop.

    `together` evaluates the models that a step needs: one after the other, or however it shares out the work.
    Raises NumericalError, naming step, model and cell, when an estimate is not finite.
    """

    def denoise(x: Tensor, step: int) -> Tensor:
        weights = plan.weights(step)
        use_views, use_frames = needed(weights, plan.config.uc_type)
        view, frame = together(
            views if use_views else None, frames if use_frames else None, x, float(plan.sigmas[step])
        )
        return compose(
            finite(view, "view", step),
            finite(frame, "frame", step),
            weights,
            plan.view_guidance,
            plan.frame_guidance_at(step),
            plan.config.uc_type,
        )

    while state.step < plan.config.steps:
        state = advance(state, plan, denoise, noise)
        callback(state)
    return state.x


def advance(
    state: State,
    plan: Plan,
    denoise: Callable[[Tensor, int], Tensor],  # x and step -> clean estimate at that step's noise level
    noise: Noise,
) -> State:
    """One step, or one of a step's two passes.

    Noise is put back after the first pass (VRS, the variance-reducing sampling of Diffusion²).  The
    reference's has the standard deviation |sigma_i - sigma_{i+1}|, where the level asks for
    sqrt(sigma_i² - sigma_{i+1}²).
    """
    x, step = state.x, state.step
    x, estimate = METHODS[plan.config.method](x, step, plan.sigmas.tolist(), denoise, state.previous)
    if state.again + 1 == plan.passes(step):
        return State(x, step + 1, 0, estimate)
    sigma, after = (float(s) for s in plan.sigmas[step : step + 2])
    std = sigma - after if plan.config.vrs == "reference" else (sigma**2 - after**2) ** 0.5
    # What was remembered belongs to the path that has just been left.
    return State(x + std * noise(step).to(x), step, state.again + 1, None)


def finite(estimate: Estimate | None, model: str, step: int) -> Estimate | None:
    """The estimate as it is; raises NumericalError where it holds NaN or infinity."""
    for part in estimate or ():
        if not part.isfinite().all():
            v, f = (int(i) for i in part.isfinite().flatten(2).all(2).logical_not().nonzero()[0])
            raise NumericalError(f"the {model} model's estimate of view {v}, frame {f} is not finite in step {step}")
    return estimate


def refine(
    sample: Callable[[Tensor], Tensor],  # runs the whole loop from noise
    noise: Noise,  # iteration -> [V, F, C, h, w], N(0, 1)
    iterations: int,
    sigma: float,  # the first noise level
    mask: Tensor,  # [V, F, h, w] or, for one sequence, [T, h, w] (schedule.low_pass)
) -> Tensor:  # like the noise
    """FreeInit (Wu et al. 2023): samples again, each time from the low frequencies of the last result.

    Every iteration has high frequencies of its own; what noises the last result is always the first noise.
    """
    first = noise(0)
    result = sample(first)
    for iteration in range(1, iterations):
        result = sample(freeinit_noise(result, first, noise(iteration), sigma, mask))
    return result


# A step takes x and `previous`, both [V, F, C, h, w], and returns x at the next level and a new `previous`.
Step = tuple[Tensor, Tensor | None]
Estimator = Callable[[Tensor, int], Tensor]


def euler(x: Tensor, step: int, sigmas: list[float], denoise: Estimator, previous: Tensor | None) -> Step:
    """x + (sigma' - sigma)·d with d = (x - D)/sigma."""
    sigma, after = sigmas[step : step + 2]
    return x + (after - sigma) * (x - denoise(x, step)) / sigma, None


def heun(x: Tensor, step: int, sigmas: list[float], denoise: Estimator, previous: Tensor | None) -> Step:
    """Euler, corrected by the slope at its end (Karras et al. 2022, alg. 1)."""
    sigma, after = sigmas[step : step + 2]
    slope = (x - denoise(x, step)) / sigma
    there = x + (after - sigma) * slope
    if after == 0:
        return there, None
    return x + (after - sigma) * (slope + (there - denoise(there, step + 1)) / after) / 2, None


def dpmpp2m(x: Tensor, step: int, sigmas: list[float], denoise: Estimator, previous: Tensor | None) -> Step:
    """DPM-Solver++(2M): the estimate extrapolated from the step before in ln sigma (Lu et al., alg. 2)."""
    sigma, after = sigmas[step : step + 2]
    estimate = denoise(x, step)
    extrapolated = estimate
    if previous is not None and after > 0:
        ratio = math.log(sigma / after) / math.log(sigmas[step - 1] / sigma)
        extrapolated = estimate + ratio / 2 * (estimate - previous)
    return x + (after / sigma - 1) * (x - extrapolated), estimate


METHODS = {"euler": euler, "heun": heun, "dpmpp2m": dpmpp2m}
