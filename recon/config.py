"""Every knob of stage 2, with its default, unit and range."""

from __future__ import annotations

from d2.config import config, option


@config
class ReconstructConfig:
    """Learning rates are for a scene whose half side is 1 and are scaled with it; fractions are of the whole run."""

    iterations: int = option(20000, "optimisation steps", ge=1, le=10_000_000)
    seed: int = option(0, "seed of everything random", ge=0, lt=2**63)
    size: int = option(0, "longer side in pixels that images are filtered to; 0 = as they are", ge=0, le=8192)
    pairs: int = option(1, "(view, time) pairs a step", ge=1, le=64)
    sh_degree: int = option(0, "degree of the spherical harmonics", ge=0, le=3)
    antialiased: bool = option(False, "rasterize with the Mip-Splatting opacity compensation")

    coarse_until: float = option(0.5, "fraction of the run at half resolution, where images are large", ge=0, le=1)
    start_gaussians: int = option(15000, "Gaussians to start with", ge=1, le=10_000_000)
    max_gaussians: int = option(25000, "Gaussians to grow to", ge=1, le=50_000_000)
    start_duration: float = option(0.15, "standard deviation in time to start with, of the clip", gt=0, le=100)
    grow_from: float = option(0.03, "fraction of the run at which growing starts", ge=0, le=1)
    grow_until: float = option(0.5, "fraction of the run at which growing ends", ge=0, le=1)
    grow_every: int = option(200, "steps between two rounds of prune and grow", ge=1)
    opacity_reset_every: int = option(0, "steps between two resets of opacities while growing; 0 = never", ge=0)
    prune_opacity: float = option(0.01, "a Gaussian fainter than this at its best moment goes", ge=0, lt=1)

    min_scale: float | None = option(
        None,
        "least standard deviation, in pixels of a picture that the scene fills, against needles; "
        "default 0.3 with disagreement, else 0",
        ge=0,
        le=100,
    )

    charbonnier: float = option(0.0, "color error below which the loss is squared, not absolute; 0 = L1", ge=0, le=1)
    trim: float = option(0.0, "share of a picture's pixels, the worst, that teach nothing", ge=0, lt=1)
    others_weight: float = option(
        1.0, "weight of pictures that are neither of the input's view nor of the moment the views came from", gt=0, le=1
    )
    lpips_weight: float = option(0.0, "weight of LPIPS, which needs its weights", ge=0)
    lpips: str = option("", "file with the weights of LPIPS (safetensors)")
    ssim_weight: float = option(0.2, "weight of 1 - SSIM against L1", ge=0, le=1)
    mask_weight: float = option(0.3, "weight of the alpha loss", ge=0)
    duration_weight: float = option(0.0, "weight of the prior for long durations", ge=0)
    opacity_weight: float = option(0.0, "weight of the mean opacity", ge=0)
    haze_weight: float | None = option(
        None,
        "weight of the mean opacity for pictures that stay unlike the model, which contradict others; "
        "default 0.1 with disagreement, else 0",
        ge=0,
    )
    scale_weight: float = option(0.0, "weight of the mean scale over the scene's half side", ge=0)

    lr_means: float = option(1.6e-3, "learning rate of positions", ge=0)
    lr_velocities: float = option(1e-2, "learning rate of velocities", ge=0)
    lr_times: float = option(3e-3, "learning rate of times", ge=0)
    lr_durations: float = option(3e-2, "learning rate of log durations", ge=0)
    lr_quats: float = option(2e-2, "learning rate of rotations", ge=0)
    lr_scales: float = option(4e-2, "learning rate of log scales", ge=0)
    lr_opacities: float = option(6e-2, "learning rate of opacity logits", ge=0)
    lr_sh: float = option(5e-3, "learning rate of colour (higher degrees a twentieth)", ge=0)
    lr_end: float = option(0.1, "what all learning rates decay to, as a fraction", gt=0, le=1)

    disagreement: bool | None = option(
        None, "whether pictures may contradict each other: sets what says so here; default: whether a model made them"
    )
    correct_colors: bool | None = option(None, "solve for an affine colour of every picture; default with disagreement")
    correct_poses: bool | None = option(None, "solve for a small motion of every picture; default with disagreement")
    correct_times: bool | None = option(None, "solve for a shift in time of every picture; default with disagreement")
    correct_blurs: bool | None = option(None, "solve for how soft every picture is; default with disagreement")
    correct_from: float = option(
        0.1, "fraction of the run at which these corrections and the weight on haze start", ge=0, le=1
    )
    refine_rig: bool | None = option(
        None,
        "find the orbit's direction, the field of view, the elevation and small poses of the views by a coarse fit"
        " first; default with disagreement",
    )

    average_from: float = option(
        0.55,
        "fraction of the run at which the average of the model over steps starts; not before grow_until",
        ge=0,
        le=1,
    )
    average_over: int = option(300, "steps that this average looks back over; 0 = no average", ge=0)

    holdout: int = option(12, "cells kept from training to choose the best model by", ge=0)
    validate_every: int = option(1000, "steps between two validations and checkpoints", ge=1)
