"""The pair of models as the matrix needs it: one for its columns, one for its rows, each loaded when it is used."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from d2 import fileio, machine
from d2.config import config, option
from d2.denoiser import Denoiser, Estimate, GatedDenoiser, Lines, MatrixDenoiser, OwnDenoiser, UNetDenoiser, in_turn
from d2.errors import InputError, ResourceError, SetupError, is_out_of_memory
from d2.models import weights
from d2.models.blocks import Blend, FeedForward
from d2.models.clip import ViTConfig
from d2.models.conditioner import (
    SV3D_SLOTS,
    SVD_SLOTS,
    Conditioner,
    Conditioning,
    condition,
    sv3d_angles,
    sv3d_vector,
    svd_vector,
)
from d2.models.offload import Offload
from d2.models.patch import PatchConfig, PatchFirstStage
from d2.models.unet import UNetConfig, VideoUNet
from d2.models.vae import FirstStage, VAEConfig
from d2.models.weights import SV3D, SVD, ModelSpec
from d2.previews import LATENT_RGB
from d2.stage import Stage

Model = Literal["view", "frame"]
AXES: dict[Model, Literal["columns", "rows"]] = {"view": "columns", "frame": "rows"}
Compile = Literal["off", "kernels", "graph"]


@dataclass(frozen=True)
class Execution:
    """How the networks run; but for rounding it changes nothing of what they compute."""

    dtype: torch.dtype = torch.float32  # of the UNets; what looks at pictures and draws them runs in float32
    offload: bool = False  # UNets are on the device only while they run
    halves: bool = False  # a guidance pair is evaluated one after the other
    feed_forward_chunk: int = 0  # pixels that a feed-forward layer takes at a time, 0 all
    channels_last: bool = False
    compile: Compile = "off"  # fused kernels, or those replayed as a CUDA graph


@config
class PairConfig:
    """Which two checkpoints, and the hyper-parameters both share; the defaults are SV3D-p and SVD-XT."""

    view_model: str = option(SV3D.name, "view checkpoint: a file name without .safetensors")
    view_source: str = option(SV3D.repository, "where its owner publishes it: a Hugging Face repository, or empty")
    frame_model: str = option(SVD.name, "frame checkpoint: a file name without .safetensors")
    frame_source: str = option(SVD.repository, "where its owner publishes it: a Hugging Face repository, or empty")
    licence: str = option(SVD.licence, "licence of both checkpoints")

    unet_channels: int = option(320, "width of the UNet's first level", ge=8, le=4096, multiple_of=8)
    unet_mult: tuple[int, ...] = option((1, 2, 4, 4), "width of every level, times the first's", strict=False)
    unet_blocks: int = option(2, "residual blocks a level", ge=1, le=16)
    unet_attention: tuple[int, ...] = option((1, 2, 4), "down-sampling factors with attention", strict=False)
    unet_head: int = option(64, "channels of an attention head", ge=1, le=1024)
    unet_groups: int = option(32, "groups of the UNet's norms", ge=1, le=1024)
    preconditioning: Literal["edm", "gated"] = option(
        "edm", "what surrounds the UNet: EDM's scalings, or the same around the reference with a gate on the skip"
    )
    sigma_data: float = option(1.0, "standard deviation of latents that the gated kind counts on", gt=0, le=100)
    embedding: int = option(256, "channels that stand for one number of the conditioning", ge=2, le=4096)
    clip_size: int = option(224, "side of CLIP's picture in pixels", ge=8, le=1024)
    clip_patch: int = option(14, "side of CLIP's patches in pixels", ge=1, le=128)
    clip_width: int = option(1280, "width of CLIP", ge=8, le=8192)
    clip_layers: int = option(32, "blocks of CLIP", ge=1, le=256)
    clip_heads: int = option(16, "attention heads of CLIP", ge=1, le=256)
    clip_output: int = option(1024, "length of CLIP's embedding, the UNet's context", ge=1, le=8192)
    autoencoder: Literal["kl", "patch"] = option(
        "kl", "Stable Diffusion's, or principal components of patches with a small decoder"
    )
    patch: int = option(4, "side of a patch in pixels", ge=1, le=32)
    latent_channels: int = option(4, "channels of a latent", ge=1, le=1024)
    vae_channels: int = option(128, "width of the autoencoder's first level", ge=8, le=4096, multiple_of=8)
    vae_mult: tuple[int, ...] = option((1, 2, 4, 4), "width of every level, times the first's", strict=False)
    vae_blocks: int = option(2, "residual blocks a level of the autoencoder", ge=1, le=16)

    @property
    def multiple(self) -> int:
        """Pixels: the side of a picture is a multiple of it."""
        return self.factor * 2 ** (len(self.unet_mult) - 1)

    @property
    def factor(self) -> int:
        """Pixels of a picture to a pixel of its latent."""
        return self.patch if self.autoencoder == "patch" else 2 ** (len(self.vae_mult) - 1)

    def spec(self, model: Model) -> ModelSpec:
        """The layout of one checkpoint."""
        view = model == "view"
        unet = UNetConfig(
            in_channels=2 * self.latent_channels,
            out_channels=self.latent_channels * (2 if self.preconditioning == "gated" else 1),
            norm_groups=self.unet_groups,
            model_channels=self.unet_channels,
            channel_mult=self.unet_mult,
            num_res_blocks=self.unet_blocks,
            attention_resolutions=self.unet_attention,
            num_head_channels=self.unet_head,
            context_dim=self.clip_output,
            adm_in_channels=(5 if view else 3) * self.embedding,
        )
        clip = (self.clip_size, self.clip_patch, self.clip_width, self.clip_layers, self.clip_heads)
        return ModelSpec(
            self.view_model if view else self.frame_model,
            unet,
            SV3D_SLOTS if view else SVD_SLOTS,
            not view,
            self.view_source if view else self.frame_source,
            ViTConfig(*clip, output_dim=self.clip_output),
            vae=self._autoencoder(),
            licence=self.licence,
        )

    def _autoencoder(self) -> VAEConfig | PatchConfig:
        z, width, blocks = self.latent_channels, self.vae_channels, self.vae_blocks
        if self.autoencoder == "patch":
            return PatchConfig(self.patch, z, width, blocks)
        return VAEConfig(width, self.vae_mult, blocks, z_channels=z)


def load_models(
    settings: PairConfig,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    execution: Execution | None = None,
    denoisers: Mapping[Model, OwnDenoiser] = MappingProxyType({}),  # in the place of a model's UNet
) -> Pair:
    """The pair found in `folder`, $D2_WEIGHTS or checkpoints/, both headers checked, no tensor read yet.

    With a view denoiser given, the view checkpoint is not needed.  Raises SetupError where a file is missing or is not
    exactly the checkpoint that `settings` describes.
    """
    specs: dict[Model, ModelSpec] = {"view": settings.spec("view"), "frame": settings.spec("frame")}
    paths = _find({model: spec for model, spec in specs.items() if model == "frame" or model not in denoisers}, folder)
    for model, path in paths.items():
        weights.check(path, specs[model])
    return Pair(settings, specs, paths, torch.device(device), execution or Execution(), denoisers)


def checks(folder: str | Path | None = None) -> list[machine.Check]:
    """What `d2 doctor` says about the official checkpoints: found and exactly right, or how to get them.

    Reads headers only, well under a second; none raises.
    """
    found = []
    for spec in (SV3D, SVD):
        try:
            path = weights.find(spec, folder)
            weights.check(path, spec)
            found.append(machine.Check(spec.name, True, True, f"{fileio.quoted(path)} ({spec.licence})"))
        except SetupError as error:
            found.append(machine.Check(spec.name, False, True, str(error)))
    return found


def _find(specs: dict[Model, ModelSpec], folder: str | Path | None) -> dict[Model, Path]:
    """Both files; what is missing is said in one go."""
    paths: dict[Model, Path] = {}
    missing = []
    for model, spec in specs.items():
        try:
            paths[model] = weights.find(spec, folder)
        except SetupError as error:
            missing.append(str(error))
    if missing:
        hint = " -- or try the small models that come with d2: --preset tiny" if specs["frame"].repository else ""
        raise SetupError(" -- and ".join(missing) + hint)
    return paths


class Pair:
    """Both models.  At most the two UNets stay loaded; the rest comes and goes with the call that needs it.

    Where the view checkpoint is not needed, the frame model's networks look at pictures and draw them for both.
    """

    def __init__(
        self,
        settings: PairConfig,
        specs: dict[Model, ModelSpec],
        paths: dict[Model, Path],
        device: torch.device,
        execution: Execution,
        denoisers: Mapping[Model, OwnDenoiser] = MappingProxyType({}),
    ) -> None:
        self.settings, self.specs, self.paths = settings, specs, paths
        self.device, self.execution, self.denoisers = device, execution, denoisers
        self.unets: dict[Model, VideoUNet] = {}
        self.offloaded: dict[Model, Offload] = {}
        self.in_flight: dict[str, int] = {}  # axis -> lines in flight, where memory allowed fewer than asked for

    def digests(self) -> dict[str, str]:
        """File name -> sha256, of a folder of diffusers that of its files' names and digests."""
        return {self.specs[model].filename: weights.digest(path) for model, path in self.paths.items()}

    def release(self) -> None:
        """Lets the UNets go, so that the decoder has the memory."""
        self.unets.clear()
        self.offloaded.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def conditions(
        self,
        model: Model,
        pictures: Tensor,  # [N, 3, H, W] in -1..1, one for each line
        noise: Callable[[int], Tensor],  # line -> [3, H, W], N(0, 1)
        vector: Tensor,  # [T, A]
        cond_aug: float,  # standard deviation of the noise on the picture
    ) -> list[Conditioning]:
        """What each line is conditioned on, from its reference picture."""
        look = cast(Conditioner, self._load(model, "conditioner"))
        found = []
        for line, picture in enumerate(pictures):
            with torch.no_grad():
                token, latent = look(picture[None].to(self.device), noise(line)[None].to(self.device), cond_aug)
            found.append(condition(token, latent, vector.to(self.device)).to(self.device, self.execution.dtype))
        return found

    def view_vector(
        self,
        elevation: Tensor,  # [V] rad
        azimuth: Tensor,  # [V] rad
        cond_aug: float,
    ) -> Tensor:  # [V, A]
        """The numbers a column is conditioned on."""
        return sv3d_vector(cond_aug, *sv3d_angles(elevation, azimuth), self.settings.embedding)

    def frame_vector(self, fps_id: float, motion: float, cond_aug: float, F: int) -> Tensor:  # [F, A]
        """The numbers a row is conditioned on."""
        return svd_vector(fps_id, motion, cond_aug, F, self.settings.embedding)

    def lines(
        self,
        model: Model,
        conditions: list[Conditioning],
        in_flight: int = 1,
        blend: Blend | None = None,
        guided_from: float = math.inf,  # noise level above which the unconditional estimate is not used
        shallow_at: Collection[float] = (),  # noise levels at which deep features are reused
    ) -> MatrixDenoiser:
        """The denoiser of all columns or all rows, for sampler.sample_matrix.

        With `offload` the network is on the device only while it runs.  Where memory runs out, half as
        many lines are tried, down to one, then the halves of its guidance pair one after the other; `in_flight`
        says how many lines it became.  Raises ResourceError where that is too much too.
        """
        own: Denoiser | None = self.denoisers.get(model)
        unet = None if own else self._unet(model)
        offloaded = self.offloaded.get(model)
        if offloaded:
            offloaded.fetch(whole=True)
        denoiser = own or precondition(self.settings, model, cast(VideoUNet, unet), blend)
        reuses = () if own else shallow_at
        lines = Lines(denoiser, conditions, AXES[model], in_flight, guided_from, self.execution.halves, reuses)
        if offloaded:
            offloaded.release()

        def denoise(x: Tensor, sigma: float) -> Estimate:
            if offloaded:
                offloaded.fetch()
            while (estimate := self._attempt(lines, x, sigma)) is None:
                if lines.in_flight > 1 and blend is None:
                    lines.in_flight //= 2
                elif not lines.halves and guided_from > 0:
                    lines.halves = True
                else:
                    hint = "try the preset low-vram, a smaller size, or another device"
                    raise ResourceError(f"out of memory with {lines.in_flight} {lines.axis} in flight; {hint}")
                self.in_flight[lines.axis] = lines.in_flight
            if offloaded:
                offloaded.release()
            return estimate

        return denoise

    together = staticmethod(in_turn)  # how a step evaluates both models

    def decode_rows(
        self,
        latents: Tensor,  # [N, F, C, h, w], as sampled
        chunk: int,  # pictures at a time
    ) -> Iterator[Tensor]:  # [F, 3, H, W] in 0..1
        """The pictures of one row after the other."""
        stage = self.first_stage("frame")
        for row in latents:
            yield stage.decode(row, chunk)

    def _unet(self, model: Model) -> VideoUNet:
        """Loaded once, and made ready to run as asked for."""
        if model not in self.unets:
            how = self.execution
            device = torch.device("cpu") if how.offload else self.device
            unet = cast(VideoUNet, weights.load(self.paths[model], self.specs[model], "unet", how.dtype, device))
            for module in unet.modules():
                if isinstance(module, FeedForward):
                    module.chunk = how.feed_forward_chunk
            if how.channels_last:
                for parameter in unet.parameters():
                    if parameter.ndim == 4:
                        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            if how.offload:
                self.offloaded[model] = Offload(unet, self.device)
            if how.compile != "off":
                unet.compile(mode="reduce-overhead" if how.compile == "graph" else "default")
            self.unets[model] = unet
        return self.unets[model]

    def _attempt(self, lines: Lines, x: Tensor, sigma: float) -> Estimate | None:
        """The estimate, or None where memory ran out; on return whatever the attempt held is free again."""
        try:
            return lines(x, sigma)
        except (MemoryError, RuntimeError) as error:  # leaving this block frees the tensors of the attempt
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def first_stage(self, model: Model) -> Stage:
        """The autoencoder that a model's latents are drawn with, and for the frame model encoded with."""
        return Stage(cast(FirstStage | PatchFirstStage, self._load(model, "first_stage")), self.device, model == "view")

    @functools.cache  # noqa: B019 (a pair lives as long as its run)
    def colours(self) -> tuple[np.ndarray, float]:  # [C, 3] in -1..1
        """Colour of each latent channel and of latent 0, for previews without a decoder."""
        if self.settings.autoencoder == "kl":
            return LATENT_RGB, 0.0
        stage = cast(PatchFirstStage, self._load("frame", "first_stage"))
        return stage.decoder.expand.weight.mean((2, 3)).cpu().numpy(), 1.0

    def _load(self, model: Model, part: weights.Part) -> Any:
        model = model if model in self.paths else "frame"
        return weights.load(self.paths[model], self.specs[model], part, torch.float32, self.device)


def precondition(settings: PairConfig, model: Model, unet: VideoUNet, blend: Blend | None = None) -> UNetDenoiser:
    """The network as a denoiser of the kind that it was trained as."""
    if settings.preconditioning == "gated":
        return GatedDenoiser(unet, settings.sigma_data, "last" if model == "view" else "all", blend)
    return UNetDenoiser(unet, blend)


def model_angles(V: int) -> Tensor:  # [V] rad
    """Azimuths as the view model was taught them, whichever way the cameras turn; the last one is the input."""
    return torch.arange(1, V + 1, dtype=torch.float64) / V * (2 * math.pi)


def check_size(size: int, settings: PairConfig) -> None:
    """Raises InputError for a side that the networks cannot halve as often as they do."""
    if size % settings.multiple:
        raise InputError(f"size {size}: expected a multiple of {settings.multiple}")
