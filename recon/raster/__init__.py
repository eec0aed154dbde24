"""One `rasterize` for every machine: gsplat on CUDA, our own kernels on CPU, a dense twin to check both."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2.errors import SetupError
from d2.recon.raster import sh as spherical

BackendName = Literal["auto", "cpu", "gsplat", "reference"]
RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]


class Motion(NamedTuple):
    """Makes the Gaussians 4D: camera c sees them at t[c] (specs: velocity form)."""

    velocities: Tensor  # [N, 3] world per unit of time
    times: Tensor  # [N] when mean and opacity are what they are called
    durations: Tensor  # [N] > 0, standard deviation in time
    t: Tensor  # [C] in 0..1


class Backend(NamedTuple):
    """Which rasterizer draws, and why."""

    name: Literal["cpu", "gsplat", "reference"]
    reason: str


def choose_backend(device: torch.device | str) -> Backend:
    """The backend for tensors on `device`. Raises SetupError for a device nothing here draws on."""
    kind = torch.device(device).type
    if kind == "cpu":
        return Backend("cpu", "tensors are on the CPU and gsplat has CUDA kernels only")
    if kind == "cuda":
        from d2.recon.raster import gsplat

        return Backend("gsplat", f"tensors are on {device}; gsplat {gsplat.version()}")
    raise SetupError(f"no rasterizer for device {device}; use --device cpu or --device cuda")


def rasterize(
    means: Tensor,  # [..., N, 3] world; [N, 3] with motion
    quats: Tensor,  # [..., N, 4] wxyz, any length but zero
    scales: Tensor,  # [..., N, 3] > 0
    opacities: Tensor,  # [..., N] in 0..1
    colors: Tensor,  # [..., N, D], or [N, K, 3] spherical harmonics with sh_degree
    viewmats: Tensor,  # [..., C, 4, 4] world to camera, OpenCV
    Ks: Tensor,  # [..., C, 3, 3] pixels
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,  # pixels², the low-pass added to every projected covariance
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,  # [..., C, D]
    render_mode: RenderMode = "RGB",
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    motion: Motion | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, dict]:
    """Draws Gaussians; argument names, shapes and results are those of `gsplat.rasterization`.

    Returns images [..., C, H, W, D], alphas [..., C, H, W, 1] and meta: "backend", "reason", and "means2d"
    [..., C, N, 2] whose `.grad` is the image-plane gradient after backward().  In the depth modes the last
    channel is the accumulated ("D") or expected ("ED") depth along the camera's z axis.  Differentiable in
    means, quats, scales, opacities, colors, backgrounds, viewmats and the motion.  A degenerate Gaussian (zero
    quaternion, overflowing scale) is not drawn; NaN or infinity in a parameter raises NumericalError.
    """
    chosen = choose_backend(means.device) if backend == "auto" else Backend(backend, "asked for by the caller")
    if chosen.name == "gsplat":
        from d2.recon.raster import gsplat

        image, alpha, means2d = gsplat.render(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, motion=motion,
            near_plane=near_plane, far_plane=far_plane, eps2d=eps2d, sh_degree=sh_degree,
            backgrounds=backgrounds, render_mode=render_mode, rasterize_mode=rasterize_mode,
        )  # fmt: skip
        return image, alpha, {"backend": chosen.name, "reason": chosen.reason, "means2d": means2d}

    batch = means.shape[:-2]
    C, N = viewmats.shape[-3], means.shape[-2]
    learning = torch.is_grad_enabled() and any(
        x.requires_grad for x in (means, quats, scales, opacities, colors, viewmats, *(motion or ())[:3])
    )
    screen = torch.zeros(*batch, C, N, 2, dtype=means.dtype, requires_grad=learning)
    options = _Options(
        width, height, near_plane, far_plane, eps2d, rasterize_mode == "antialiased",
        sh_degree, render_mode, motion, chosen.name,
    )  # fmt: skip
    images, alphas = [], []
    for b in _indices(batch):
        gaussians = (means[b], quats[b], scales[b], opacities[b], colors[b] if sh_degree is None else colors)
        for c in range(C):
            image, alpha = _draw_one(*gaussians, viewmats[b][c], Ks[b][c], screen[b][c], c, options)
            if backgrounds is not None:
                image = _over_background(image, alpha, backgrounds[b][c], render_mode)
            images.append(image)
            alphas.append(alpha)
    shape = (*batch, C, height, width, -1)
    meta = {"backend": chosen.name, "reason": chosen.reason, "means2d": screen}
    return torch.stack(images).reshape(shape), torch.stack(alphas).reshape(shape), meta


def image_plane_gradient(meta: dict) -> Tensor:
    """Gradient of the loss by every projected mean after backward(): [C, N, 2] per pixel, zero if not drawn."""
    means2d = meta["means2d"] if isinstance(meta["means2d"], list) else [meta["means2d"]]
    return torch.cat([each.grad.reshape(-1, *each.shape[-2:]) for each in means2d])


class _Options(NamedTuple):
    width: int
    height: int
    near_plane: float
    far_plane: float
    eps2d: float
    antialiased: bool
    sh_degree: int | None
    render_mode: str
    motion: Motion | None
    backend: str


def _draw_one(means, quats, scales, opacities, colors, viewmat, K, screen, c, o: _Options):
    """One camera: image [H, W, D] without background, alpha [H, W]."""
    moved = means
    if o.motion is not None:
        moved = means + (o.motion.t[c] - o.motion.times)[:, None] * o.motion.velocities if _needs_place(o) else means
    channels = []
    if o.render_mode.startswith("RGB"):
        channels.append(_colors(colors, moved, viewmat, o.sh_degree))
    if o.render_mode.endswith("D"):
        channels.append(moved @ viewmat[2, :3, None] + viewmat[2, 3])
    features = torch.cat(channels, -1)
    draw = _draw_reference if o.backend == "reference" else _draw_cpu
    image, alpha = draw(means, quats, scales, opacities, features, viewmat, K, screen, c, o)
    if o.render_mode.endswith("ED"):
        depth = image[..., -1:] / alpha[..., None].clamp_min(1e-10)
        image = torch.cat([image[..., :-1], depth], -1)
    return image, alpha


def _needs_place(o: _Options) -> bool:
    """Whether anything but the kernel has to know where the Gaussians are at time t."""
    return bool(o.sh_degree) or o.render_mode != "RGB"


def _draw_cpu(means, quats, scales, opacities, features, viewmat, K, screen, c, o: _Options):
    from d2.recon.raster import cpu

    if o.motion is None:
        velocities, times = torch.zeros_like(means), torch.zeros_like(opacities)
        durations, t = torch.full_like(opacities, torch.inf), 0.0
    else:
        velocities, times, durations, t = (
            o.motion.velocities,
            o.motion.times,
            o.motion.durations,
            float(o.motion.t[c].detach()),
        )
        if o.motion.t.requires_grad:  # the kernel sees t - times alone, so times can carry the gradient of t
            times = times - (o.motion.t[c] - o.motion.t[c].detach())
    camera = cpu.Camera(K, o.width, o.height, o.near_plane, o.far_plane, o.eps2d, t, o.antialiased)
    moving = (velocities, times, durations, screen, viewmat, camera)
    if features.shape[-1] == 3:
        return cpu.splat(means, quats, scales, opacities, features, *moving)
    padded = torch.nn.functional.pad(
        features, (0, -features.shape[-1] % 3)
    )  # the kernels draw three channels at a time
    drawn = [cpu.splat(means, quats, scales, opacities, group, *moving) for group in padded.split(3, -1)]
    return torch.cat([image for image, _ in drawn], -1)[..., : features.shape[-1]], drawn[0][1]


def _draw_reference(means, quats, scales, opacities, features, viewmat, K, screen, c, o: _Options):
    from d2.recon.raster import reference

    if o.motion is not None:
        means, opacities = reference.slice_at(
            means, opacities, o.motion.velocities, o.motion.times, o.motion.durations, o.motion.t[c]
        )
    return reference.render(
        means, quats, scales, opacities, features, viewmat, K, o.width, o.height,
        o.near_plane, o.far_plane, o.eps2d, o.antialiased, screen,
    )  # fmt: skip


def _colors(colors: Tensor, means: Tensor, viewmat: Tensor, sh_degree: int | None) -> Tensor:
    if sh_degree is None:
        return colors
    return spherical.evaluate(sh_degree, means + viewmat[:3, :3].T @ viewmat[:3, 3], colors)


def _over_background(image: Tensor, alpha: Tensor, background: Tensor, render_mode: str) -> Tensor:
    """Colour channels over the background; depth has none."""
    if not render_mode.startswith("RGB"):
        return image
    D = background.shape[-1]
    color = image[..., :D] + (1 - alpha[..., None]) * background
    return torch.cat([color, image[..., D:]], -1) if image.shape[-1] > D else color


def _indices(batch: torch.Size) -> list[tuple[int, ...]]:
    return (
        [
            tuple(int(i) for i in row)
            for row in torch.cartesian_prod(*(torch.arange(n) for n in batch)).reshape(-1, len(batch))
        ]
        if batch
        else [()]
    )
