"""What a run will take before it begins: memory, arithmetic and time, counted on tensors that hold no data."""

from __future__ import annotations

import dataclasses
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from d2 import config as configuration
from d2 import inputs, machine
from d2.compose import needed
from d2.launch import execution
from d2.models.blocks import FeedForward
from d2.models.unet import Deep, VideoUNet
from d2.models.weights import build
from d2.pair import Execution, Model, check_size, model_angles
from d2.ranks import shares
from d2.sampler import plan
from d2.settings import GenerateConfig

GB = 1e9
CONTEXT = {"cuda": 0.6 * GB, "cpu": 0.5 * GB}  # bytes that torch and its libraries take before any tensor
GPUS = (6, 8, 12, 16, 24, 32, 48, 80, 141, 192)  # GB that GPUs come with
SLACK = 1.15  # what an allocator and the libraries' workspaces add to live tensors
EFFICIENCY = 0.5  # of a network, measured against one large matrix product
MOST_IN_FLIGHT = 4  # lines; more gain nothing on a GPU, which one row of 25 pictures and its twin fill


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, count: int) -> None:
        self.now -= count


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: no matrix of weights is ever held."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key = args[:2]
        self.flops += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a network."""

    flops: int
    peak: int  # bytes of activations
    weights: int  # bytes
    reusing: int = 0  # FLOPs where the step cache holds its deep features
    deep: int = 0  # bytes of those


def evaluation(settings: GenerateConfig, model: Model, how: Execution, lines: int = 1) -> Evaluation:
    """One evaluation of a UNet: `lines` lines of the matrix, each with its guidance pair unless `how` halves it."""
    T = settings.views if model == "view" else settings.frames
    config, (_, h, w) = settings.spec(model).unet, settings.latent
    clips = lines * (1 if how.halves else 2)
    with torch.device("meta"), torch.no_grad():
        unet = VideoUNet(config).to(how.dtype)
        for module in unet.modules():
            if isinstance(module, FeedForward):
                module.chunk = how.feed_forward_chunk
        tokens = unet.project_context(torch.empty(clips * T, config.context_dim, dtype=how.dtype), T)
        pictures = torch.empty(clips * T, config.in_channels, h, w, dtype=how.dtype)
        vector = torch.empty(clips * T, config.adm_in_channels, dtype=how.dtype)
        words, deep = (pictures, torch.empty(clips * T), tokens, vector, T, None), Deep()
        with FusedAttention() as attention, FlopCounterMode(display=False) as counter, Live() as live:
            unet(*words, deep)
        flops = counter.get_total_flops() + attention.flops
        with FusedAttention() as attention, FlopCounterMode(display=False) as counter:
            unet(*words, deep)
    assert deep.features is not None
    reusing = counter.get_total_flops() + attention.flops
    return Evaluation(flops, live.peak, _bytes(unet), reusing, deep.features.nbytes)


def decoding(settings: GenerateConfig) -> Evaluation:
    """One row drawn by the frame model's decoder."""
    spec = settings.spec("frame")
    with torch.device("meta"), torch.no_grad():
        stage: Any = build(spec, "first_stage")
        latents = torch.empty(settings.frames, *settings.latent)
        with FusedAttention() as attention, FlopCounterMode(display=False) as counter, Live() as live:
            stage.decode(latents, settings.decode_chunk)
    return Evaluation(counter.get_total_flops() + attention.flops, live.peak, _bytes(stage))


def looking(settings: GenerateConfig) -> int:
    """Bytes of the network that looks at references, the larger of both."""
    with torch.device("meta"):
        return max(_bytes(build(settings.spec(model), "conditioner")) for model in ("view", "frame"))


class Memory(NamedTuple):
    """Bytes."""

    weights: int  # of the UNets that are there at once
    activations: int
    step_cache: int
    peak: float  # of sampling, drawing and looking at references, with what libraries take


@dataclass(frozen=True)
class Budget:
    """What `d2 generate --dry-run` tells."""

    ranks: int
    device: str
    dtype: str
    columns_in_flight: int
    rows_in_flight: int
    guidance_halves: bool
    feed_forward_chunk: int
    decode_chunk: int
    weights_gb: float  # of the UNets that are on the device at once
    activations_gb: float
    step_cache_gb: float  # deep features of the lines of one rank
    decoder_gb: float  # drawing the pictures, when the UNets are gone
    references_gb: float  # of the network that looks at references
    peak_gb: float  # the most of all this, with what libraries take
    gpu_gb: float  # the same on a GPU, in the precision that is usual there
    free_gb: float  # memory that the device has now
    petaflop: float  # of all ranks
    balance: float  # mean load of a rank over the largest
    tflops: float  # measured for one large matrix product, on one rank
    seconds: float  # about, at half that rate

    def text(self) -> str:
        """For people."""
        fits = "fits" if self.peak_gb <= self.free_gb else "does not fit: try --preset low-vram or a smaller --set size"
        chunks = f"{self.columns_in_flight} columns or {self.rows_in_flight} rows in flight"
        chunks += ", halves of a guidance pair in turn" * self.guidance_halves
        chunks += f", feed-forward {self.feed_forward_chunk} pixels at a time" * bool(self.feed_forward_chunk)
        gpus = [size for size in GPUS if size >= self.gpu_gb]
        on_gpu = f"on a GPU: {self.gpu_gb:.1f} GB: fits {gpus[0]} GB" if gpus else f"on a GPU: {self.gpu_gb:.0f} GB"
        units = {"days": 86400, "hours": 3600, "minutes": 60}
        unit = next((unit for unit, size in units.items() if self.seconds >= 2 * size), "s")
        cache = f" and the step cache {self.step_cache_gb:.1f} GB" * bool(self.step_cache_gb)
        time = f"{self.seconds / units.get(unit, 1):.0f} {unit}"
        return "\n".join(
            [
                f"{self.ranks} × {self.device}, {self.dtype}",
                f"memory: {self.peak_gb:.1f} GB at most of {self.free_gb:.1f} GB free: {fits}",
                f"  UNets {self.weights_gb:.1f} GB and activations {self.activations_gb:.1f} GB{cache}; then the "
                f"decoder with {self.decoder_gb:.1f} GB; before them {self.references_gb:.1f} GB that look at "
                "references",
                *([on_gpu] if self.device == "cpu" else []),
                f"chunks: {chunks}; the decoder {self.decode_chunk} frames at a time",
                f"arithmetic: {self.petaflop:.3g} PFLOP, spread over ranks to {100 * self.balance:.0f} %",
                f"time: about {time}, at half of the {self.tflops:.3g} TFLOP/s of one matrix product here",
            ]
        )


def dry_run(source: Path | None, preset: str, sets: tuple[str, ...], device: str, ranks: int) -> Budget:
    """What generation.generate would take on this machine: the input is looked at, nothing is written.

    Raises InputError for input and settings, SetupError for a device that is not there.
    """
    settings = configuration.load(GenerateConfig, configuration.preset_path(preset, "generate"), sets=sets)
    check_size(settings.size, settings)
    if source is not None:
        inputs.read(source, settings.frames, settings.pick, lambda text: None)
    return budget(settings, machine.choose_device(device), ranks)


def budget(settings: GenerateConfig, device: torch.device, ranks: int = 1) -> Budget:
    """The plan for one run on this machine; no weights are read."""
    how = execution(settings, device)
    settings = fitted(settings, device)
    each: dict[Model, Evaluation] = {model: evaluation(settings, model, how) for model in ("view", "frame")}
    halves = 2 if how.halves else 1
    line: dict[Model, int] = {model: found.flops * halves for model, found in each.items()}
    reusing: dict[Model, int] = {model: found.reusing * halves for model, found in each.items()}
    total, slowest = joint_loop(settings, line, ranks, reusing)
    whole = -(-settings.steps // settings.step_cache)
    single = [line[m] * whole + reusing[m] * (settings.steps - whole) for m in each]  # the references, on one rank
    rows, drawing = -(-settings.views // ranks), decoding(settings)
    rate = matrix_rate(device, how.dtype)
    seconds = (slowest + sum(single) + rows * drawing.flops) / (EFFICIENCY * rate)
    look = looking(settings)
    need = memory(settings, how, each, drawing, look, ranks, device.type)
    # On a GPU every tensor of a UNet is as much smaller as its type.
    less = execution(settings, torch.device("cuda")).dtype.itemsize / how.dtype.itemsize
    there: dict[Model, Evaluation] = {
        m: Evaluation(e.flops, int(e.peak * less), int(e.weights * less), e.reusing, int(e.deep * less))
        for m, e in each.items()
    }
    gpu = memory(settings, how, there, drawing, look, ranks, "cuda")
    return Budget(
        ranks, str(device), str(how.dtype).removeprefix("torch."), settings.columns_in_flight or 1,
        settings.rows_in_flight or 1, how.halves, how.feed_forward_chunk, settings.decode_chunk, need.weights / GB,
        need.activations / GB, need.step_cache / GB, (drawing.weights + drawing.peak) / GB, look / GB, need.peak / GB,
        gpu.peak / GB, free_memory(device) / GB,
        (total + sum(single) + settings.views * drawing.flops) / 1e15, total / ranks / slowest, rate / 1e12, seconds,
    )  # fmt: skip


def memory(
    settings: GenerateConfig,
    how: Execution,
    each: dict[Model, Evaluation],
    drawing: Evaluation,
    look: int,  # bytes of the network that looks at references
    ranks: int,
    kind: str,  # cuda or cpu
) -> Memory:
    """What the busiest rank needs, with as many lines in flight as the settings say, else one."""
    in_flight = {"view": settings.columns_in_flight or 1, "frame": settings.rows_in_flight or 1}
    weights = [found.weights for found in each.values()]
    held, kept = max(weights) if how.offload else sum(weights), step_cache(settings, how, each, ranks)
    active = max(found.peak * in_flight[model] for model, found in each.items())
    sampling = held + kept + SLACK * active
    peak = CONTEXT[kind] + max(sampling, drawing.weights + SLACK * drawing.peak, look)
    return Memory(held, active, kept, peak)


def step_cache(settings: GenerateConfig, how: Execution, each: dict[Model, Evaluation], ranks: int = 1) -> int:
    """Bytes of deep features that the busiest rank keeps between noise levels, both halves of each guidance pair."""
    c = settings
    if c.step_cache == 1:
        return 0
    lengths: dict[Model, int] = {"view": c.views, "frame": c.frames}
    bundles: dict[Model, list[list[int]]] = {
        "view": [[f] for f in range(c.frames)],
        "frame": [[v] for v in range(c.views)],
    }
    kept = {model: found.deep * (2 if how.halves else 1) for model, found in each.items()}
    return max(
        sum(kept[model] * len(lines) for model, lines in mine.items()) for mine in shares(bundles, lengths, ranks)
    )


def fitted(settings: GenerateConfig, device: torch.device) -> GenerateConfig:
    """With as many lines in flight as the free memory of a GPU holds, where the settings leave that open.

    On a CPU it is one line: more would change bits, not speed.
    """
    if settings.columns_in_flight and settings.rows_in_flight:
        return settings
    how, counts = execution(settings, device), {"view": 1, "frame": 1}
    if device.type == "cuda":
        each: dict[Model, Evaluation] = {model: evaluation(settings, model, how) for model in ("view", "frame")}
        weights = [found.weights for found in each.values()]
        room = free_memory(device) - (max(weights) if how.offload else sum(weights)) - step_cache(settings, how, each)
        counts = {m: max(1, min(MOST_IN_FLIGHT, int(room / (SLACK * found.peak)))) for m, found in each.items()}
    return dataclasses.replace(
        settings,
        columns_in_flight=settings.columns_in_flight or counts["view"],
        rows_in_flight=settings.rows_in_flight or counts["frame"],
    )


def joint_loop(
    settings: GenerateConfig,
    line: dict[Model, int],  # FLOPs of a line with its guidance pair
    ranks: int,
    reusing: dict[Model, int] | None = None,  # the same where deep features are reused
) -> tuple[float, float]:
    """FLOPs of the joint loop: of all ranks, and of those that the others wait for."""
    c = settings
    worked_out = plan(c, model_angles(c.views), c.frames)
    lengths: dict[Model, int] = {"view": c.views, "frame": c.frames}
    count: dict[Model, int] = {"view": c.frames, "frame": c.views}
    reuse = {model: worked_out.shallow_at(model) for model in lengths}
    total = slowest = 0.0
    for step in range(c.steps):
        use = dict(zip(("view", "frame"), needed(worked_out.weights(step), c.uc_type), strict=True))
        cost: dict[Model, float] = {}
        for model in lengths:
            guided = float(worked_out.sigmas[step]) <= worked_out.guided_from(model)
            reused = float(worked_out.sigmas[step]) in reuse[model]
            cost[model] = (reusing or line if reused else line)[model] * use[model] / (1 if guided else 2)
        bundles: dict[Model, list[list[int]]] = {
            model: [[i] for i in range(count[model] * use[model])] for model in lengths
        }
        given = shares(bundles, lengths, ranks)
        loads = [sum(cost[model] * len(lines) for model, lines in mine.items()) for mine in given]
        times = worked_out.passes(step) * (2 if c.method == "heun" and step + 1 < c.steps else 1)
        total += times * sum(loads)
        slowest += times * max(loads)
    return total * c.freeinit_matrix, slowest * c.freeinit_matrix


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of one large matrix product, measured."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    product = a @ a
    done, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not done:
        product = a @ a
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del product
    return done * 2 * n**3 / elapsed


def free_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable:"))
        return 1024.0 * int(available.split()[1])
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _bytes(network: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
