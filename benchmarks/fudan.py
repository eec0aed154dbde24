"""The method of fudan-zvg/4d-gaussian-splatting (Yang et al., ICLR 2024) on our rasterizer, to stand beside ours.

As its code trains multi-view video (configs/dynerf: batch 4, no rigidity loss): 4D Gaussians as two quaternions and
four scales, 4D spherical harmonics, .8 L1 + .2 (1 - SSIM), its learning rates, clone and split by image-plane
gradient, opacity resets, a start from uniform random points.  What differs, and why:
- The background is what we measure on (white where there are masks), which its code does with white_background.
- Its cube of ±1.3 for scenes whose cameras see 1.44 to each side is 0.9 of what the narrowest camera sees.
- Its 100,000 starting points are for pictures of 400²; smaller pictures get as many a pixel.
- Pruning by size on screen is left out: its code clears those sizes before it reads them.
- The final model counts, not the best on the test views.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor
from two_quaternions import velocity_form

from d2 import machine
from d2.recon import benchmark, dataset, hull
from d2.recon.dataset import Dataset
from d2.recon.gaussians import left_isoclinic, right_isoclinic
from d2.recon.losses import photometric_loss
from d2.recon.pipeline import kernel_threads
from d2.recon.raster import Motion, image_plane_gradient, rasterize, sh


@dataclass(frozen=True)
class Settings:
    """Names and values of its code; lengths are in units of `extent`, 1.1 times the cameras' spread."""

    iterations: int = 30_000
    batch_size: int = 4
    position_lr_init: float = 1.6e-4
    position_lr_final: float = 1.6e-6
    feature_lr: float = 2.5e-3  # of the constant; a twentieth for the rest
    opacity_lr: float = 0.05
    scaling_lr: float = 5e-3
    rotation_lr: float = 1e-3
    lambda_dssim: float = 0.2
    percent_dense: float = 0.01
    densification_interval: int = 100
    densify_from_iter: int = 500
    densify_until_iter: int = 15_000
    densify_grad_threshold: float = 2e-4
    opacity_reset_interval: int = 3000
    thresh_opa_prune: float = 0.005
    sh_increase_interval: int = 1000
    num_pts: int = 100_000  # at 400²
    least_weight: float = 0.05  # of a Gaussian at a moment; fainter ones are not drawn then


SH_DEGREE, SH_DEGREE_TIME = 3, 2
K = sh.bases(SH_DEGREE)
CUBE = 0.9  # half side of the starting cube, of what the narrowest camera sees
REFERENCE_PIXELS = 400**2


class Model:
    """Its parameters, and their optimiser."""

    def __init__(self, tensors: dict[str, Tensor], extent: float, settings: Settings) -> None:
        s = settings
        rates = {
            "xyz": s.position_lr_init * extent, "t": s.position_lr_init * extent, "f_dc": s.feature_lr,
            "f_rest": s.feature_lr / 20, "opacity": s.opacity_lr, "scaling": s.scaling_lr,
            "rotation": s.rotation_lr, "rotation_r": s.rotation_lr,
        }  # fmt: skip
        groups = [{"params": [tensors[name].requires_grad_()], "lr": lr, "name": name} for name, lr in rates.items()]
        self.adam = torch.optim.Adam(groups, lr=0.0, eps=1e-15, fused=True)
        self.extent, self.settings = extent, settings
        self.degree, self.degree_time = 0, 0
        self.clear_statistics()

    def __len__(self) -> int:
        return len(self["xyz"])

    def __getitem__(self, name: str) -> Tensor:
        return next(group["params"][0] for group in self.adam.param_groups if group["name"] == name)

    def clear_statistics(self) -> None:
        self.gradient, self.seen = (torch.zeros(len(self), device=self["xyz"].device) for _ in range(2))

    def replace(self, tensors: dict[str, Tensor], source: Tensor | None) -> None:
        """New parameters; Adam's moments are those of the old indices `source` [N], zero at -1 or without it."""
        for group in self.adam.param_groups:
            if group["name"] not in tensors:
                continue
            old = group["params"][0]
            new = tensors[group["name"]].detach().clone().requires_grad_()
            moments = self.adam.state.pop(old, None)
            if moments:
                for key in ("exp_avg", "exp_avg_sq"):
                    kept = torch.zeros_like(new)
                    if source is not None:
                        kept[source >= 0] = moments[key][source[source >= 0]]
                    moments[key] = kept
                self.adam.state[new] = moments
            group["params"] = [new]

    def form(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Velocities, durations, quats and scales."""
        return velocity_form(self["rotation"], self["rotation_r"], self["scaling"])

    def draw(self, cells: Dataset, k: int, form: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, dict, Tensor]:
        """Image [H, W, 3] without background, alpha [H, W], meta, and the indices [m] of what was drawn."""
        velocities, durations, quats, scales = form
        now = cells.times[k]
        reach = math.sqrt(-2 * math.log(self.settings.least_weight))
        shown = ((self["t"] - now).abs() < reach * durations).detach().nonzero()[:, 0]
        v, d, times, means = velocities[shown], durations[shown], self["t"][shown], self["xyz"][shown]
        motion = Motion(v, times, d, now[None])
        moved = means + (now - times)[:, None] * v
        image, alpha, meta = rasterize(
            means, quats[shown], scales[shown], self["opacity"][shown].sigmoid(),
            self._colors(shown, moved, times - now, cells.viewmats[k]), cells.viewmats[k : k + 1], cells.Ks[k : k + 1],
            cells.width, cells.height, motion=motion,
        )  # fmt: skip
        return image[0], alpha[0, ..., 0], meta, shown

    def _colors(self, shown: Tensor, moved: Tensor, dt: Tensor, viewmat: Tensor) -> Tensor:  # [m, 3]
        """4D spherical harmonics: those of the direction times cosines of the time (Eq. 9)."""
        constant = self["f_dc"][shown][:, None]
        if self.degree == 0:
            return sh.evaluate(0, moved, constant)
        rest = self["f_rest"][:, : K * (1 + self.degree_time) - 1][shown]
        now = torch.cat([constant, rest[:, : K - 1]], 1)
        for n in range(1, self.degree_time + 1):
            now = now + torch.cos(2 * math.pi * n * dt)[:, None, None] * rest[:, n * K - 1 : (n + 1) * K - 1]
        return sh.evaluate(self.degree, moved + viewmat[:3, :3].T @ viewmat[:3, 3], now)


def start(data: Dataset, settings: Settings, seed: int, device: torch.device) -> Model:
    """Uniform random points in the cube that the cameras look at, at random times, grey and faint."""
    rng = np.random.default_rng(seed)
    count = min(settings.num_pts, round(settings.num_pts * data.width * data.height / REFERENCE_PIXELS))
    centre, half = hull.scene_box(data)
    points = centre + CUBE * half * rng.uniform(-1, 1, (count, 3))
    distances, _ = KDTree(points).query(points, k=4)
    spacing = np.sqrt((distances[:, 1:] ** 2).mean(1).clip(1e-7))
    scales = np.column_stack([np.repeat(np.log(spacing)[:, None], 3, 1), np.full(count, math.log(math.sqrt(0.2)))])
    still = torch.tensor([1.0, 0, 0, 0]).repeat(count, 1)
    cameras = data.camera_centres()
    extent = 1.1 * float((cameras - cameras.mean(0)).norm(dim=-1).max())
    tensors = {
        "xyz": torch.from_numpy(points).float(),
        "t": torch.from_numpy(rng.uniform(-0.1, 1.1, count)).float(),
        "f_dc": torch.from_numpy(rng.uniform(0, 1 / 255, (count, 3))).float(),
        "f_rest": torch.zeros(count, K * (1 + SH_DEGREE_TIME) - 1, 3),
        "opacity": torch.full((count,), math.log(0.1 / 0.9)),
        "scaling": torch.from_numpy(scales).float(),
        "rotation": still,
        "rotation_r": still.clone(),
    }
    return Model({name: tensor.to(device) for name, tensor in tensors.items()}, extent, settings)


def step(model: Model, data: Dataset, cells: Tensor, now: float, before: float, iteration: int, seed: int) -> Tensor:
    """One iteration at place `now` of its schedule (0..iterations; `before` is the last one's); returns the loss."""
    s = model.settings
    for group in model.adam.param_groups:
        if group["name"] == "xyz":
            fall = s.position_lr_final / s.position_lr_init
            group["lr"] = s.position_lr_init * model.extent * fall ** min(1.0, now / s.iterations)
    level = int(now // s.sh_increase_interval)
    model.degree, model.degree_time = min(level, SH_DEGREE), min(max(0, level - SH_DEGREE), SH_DEGREE_TIME)
    form, losses, drawn = model.form(), [], []
    for k in cells.tolist():
        image, alpha, meta, shown = model.draw(data, k, form)
        losses.append(photometric_loss(image, alpha, data.images[k], data.background, s.lambda_dssim, 0.0))
        drawn.append((meta, shown))
    loss = torch.stack(losses).mean()
    loss.backward()
    _count(model, drawn, data)
    changed = False
    if now < s.densify_until_iter:
        if now > s.densify_from_iter and iteration % s.densification_interval == 0:
            densify_and_prune(model, torch.Generator().manual_seed(seed * 1_000_003 + iteration))
            changed = True
        marks = [s.opacity_reset_interval * (before // s.opacity_reset_interval + 1)]
        marks += [s.densify_from_iter] if (data.background == 1).all() else []  # on white once more, at the beginning
        if any(before < mark <= now for mark in marks):
            faint = model["opacity"].detach().clamp_max(math.log(0.01 / 0.99))
            model.replace({"opacity": faint}, None)
    if not changed:  # its new parameters have no gradient either
        model.adam.step()
    model.adam.zero_grad()
    return loss.detach()


def densify_and_prune(model: Model, generator: torch.Generator) -> None:
    """Clones small Gaussians of a large image-plane gradient, splits large ones in two, drops the faint."""
    s = model.settings
    tensors = {group["name"]: group["params"][0].detach() for group in model.adam.param_groups}
    large = tensors["scaling"][:, :3].amax(-1).exp() > s.percent_dense * model.extent
    steep = model.gradient / model.seen.clamp_min(1) >= s.densify_grad_threshold
    clones, parents = (steep & ~large).nonzero()[:, 0], (steep & large).nonzero()[:, 0]
    stays = (~(steep & large)).nonzero()[:, 0]
    source = torch.cat([stays, clones, parents, parents])
    grown = {name: tensor[source] for name, tensor in tensors.items()}
    halves = slice(len(stays) + len(clones), len(source))
    R = left_isoclinic(grown["rotation"][halves]) @ right_isoclinic(grown["rotation_r"][halves])
    scales = grown["scaling"][halves].exp()
    noise = torch.randn(scales.shape, generator=generator).to(scales)
    offset = (R @ (noise * scales)[:, :, None])[:, :, 0]
    grown["xyz"][halves] += offset[:, :3]
    grown["t"][halves] += offset[:, 3]
    grown["scaling"][halves] -= math.log(1.6)
    keep = grown["opacity"].sigmoid() >= s.thresh_opa_prune
    source[len(stays) :] = -1  # new ones start without moments
    model.replace({name: tensor[keep] for name, tensor in grown.items()}, source[keep])
    model.clear_statistics()


def train_for(
    data: Dataset,
    seconds: float,
    fitted: bool,
    settings: Settings | None = None,
    seed: int = 0,
    callback: Callable[[int, Tensor], None] = lambda iteration, loss: None,
) -> tuple[Model, int]:
    """Trains on the data's device until time is up (or the schedule is through); the model and its iterations.

    Its own schedule counts iterations of 30,000; `fitted` stretches or squeezes it to the seconds there are.
    """
    s = settings or Settings()
    model = start(data.to("cpu"), s, seed, data.images.device)
    generator = torch.Generator().manual_seed(seed)
    order, iteration, before = torch.empty(0, dtype=torch.int64), 0, 0.0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds and before < s.iterations:
        if len(order) < s.batch_size:
            order = torch.randperm(len(data), generator=generator)
        cells, order = order[: s.batch_size], order[s.batch_size :]
        iteration += 1
        now = s.iterations * elapsed / seconds if fitted else float(iteration)
        callback(iteration, step(model, data, cells, now, before, iteration, seed))
        before = now
    return model, iteration


def compare(path: Any, size: int, seconds: float, device: str = "auto") -> dict[str, Any]:
    """What `d2 bench reconstruct` measures, of this method: with its own schedule, and one fitted to the seconds."""
    place = machine.choose_device(device)
    data, test = dataset.load(path, "train", size), dataset.load(path, "test", size)
    test, moved = test.on(data.background).to(place), data.to(place)
    rows: dict[str, Any] = {"settings": asdict(Settings())}
    with kernel_threads():
        train_for(moved, 1e-6, False)  # kernels compile
        for name, fitted in (("own_schedule", False), ("fitted_schedule", True)):
            begin = time.perf_counter()
            model, iterations = train_for(moved, seconds, fitted)
            spent = time.perf_counter() - begin
            with torch.no_grad():
                found = benchmark.measure_pictures(lambda k, model=model: picture(model, test, k), test)
                sample = torch.linspace(0, len(data) - 1, min(benchmark.TRAIN_SAMPLE, len(data))).round().long()
                seen = moved.subset(sample)
                known = benchmark.measure_pictures(lambda k, model=model, seen=seen: picture(model, seen, k), seen)
            rows[name] = found | {
                "psnr_train": known["psnr"], "psnr_train_by_elevation": known["psnr_by_elevation"],
                "seconds": round(spent, 2), "iterations": iterations, "gaussians": len(model),
            }  # fmt: skip
    return rows


def picture(model: Model, cells: Dataset, k: int) -> Tensor:
    """Cell k [H, W, 3] on the dataset's background."""
    image, alpha, _, _ = model.draw(cells, k, model.form())
    return image + (1 - alpha[..., None]) * cells.background


def _count(model: Model, drawn: list[tuple[dict, Tensor]], data: Dataset) -> None:
    """Adds each Gaussian's image-plane gradient, the mean over the pictures of the step that drew it, per screen."""
    total, times = torch.zeros_like(model.gradient), torch.zeros_like(model.seen)
    half = model.gradient.new_tensor([data.width / 2, data.height / 2])
    for meta, shown in drawn:
        total[shown] += (image_plane_gradient(meta)[0] * half).norm(dim=-1) * len(drawn)
        times[shown] += 1
    seen = times > 0
    model.gradient[seen] += total[seen] / times[seen]
    model.seen += seen
