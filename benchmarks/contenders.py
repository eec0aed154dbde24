"""Ours, the prototype and OpenSplat, each as a call that draws one picture, goes back, and says what that took."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2 import fileio
from d2.recon.raster import project, rasterize, tiles
from d2.recon.raster.reference import rotation_matrices

# Compiled code stays here, because a cold compilation takes up to two minutes.
BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
OPENSPLAT_SOURCE = Path("rasterizer/gsplat-cpu/gsplat_cpu.cpp")
KERNELS = (
    (project, ("project", "project_backward")),
    (tiles, ("bin_splats", "composite", "composite_backward")),
)


class Inputs(NamedTuple):
    """One picture to draw and the gradient to send back."""

    gaussians: dict[str, Any]  # tensors means quats scales opacities colors, as `rasterize` takes them
    viewmat: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    size: int
    g_image: Tensor  # [H, W, 3]
    g_alpha: Tensor  # [H, W]


class Drawn(NamedTuple):
    """What one repetition took, and what came out, for comparison."""

    seconds: dict[str, float]  # by part, and "forward", "backward"
    image: Tensor  # [H, W, 3]
    gradient: Tensor  # [N, 4] of colours and opacity


Draw = Callable[[], Drawn]


def draw_ours(inputs: Inputs) -> Draw:
    """`rasterize` and its backward pass, with the kernels inside timed one by one."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.gaussians.items()}
    g_image, g_alpha = inputs.g_image[None], inputs.g_alpha[None, ..., None]

    def draw() -> Drawn:
        for leaf in leaves.values():
            leaf.grad = None
        with kernel_clock() as spans:
            begin = time.perf_counter()
            image, alpha, _ = rasterize(
                **leaves, viewmats=inputs.viewmat[None], Ks=inputs.K[None], width=inputs.size, height=inputs.size
            )
            middle = time.perf_counter()
            torch.autograd.backward((image, alpha.view_as(g_alpha)), (g_image, g_alpha))
            end = time.perf_counter()
        seconds = {name: stop - start for name, (start, stop) in spans.items()}
        seconds["sort"] = spans["bin_splats"][0] - spans["project"][1]  # nothing else lies between these two
        seconds["around"] = end - begin - sum(seconds.values())
        seconds |= {"forward": middle - begin, "backward": end - middle}
        gradient = torch.cat([leaves["colors"].grad, leaves["opacities"].grad[:, None]], -1)
        return Drawn(seconds, image[0].detach(), gradient)

    return draw


@contextlib.contextmanager
def kernel_clock() -> Iterator[dict[str, tuple[float, float]]]:
    """Yields begin and end by kernel; meanwhile each kernel of the rasterizer stands between two looks at the clock."""
    spans: dict[str, tuple[float, float]] = {}

    def timed(name: str, kernel: Callable) -> Callable:
        def call(*arguments):
            begin = time.perf_counter()
            result = kernel(*arguments)
            spans[name] = begin, time.perf_counter()
            return result

        return call

    originals = [(module, name, getattr(module, name)) for module, names in KERNELS for name in names]
    try:
        for module, name, kernel in originals:
            setattr(module, name, timed(name, kernel))
        yield spans
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


def load_prototype(file: Path) -> Any:
    """Imports a copy, because numba's cache wants a writable folder; an old copy is kept, with its cache."""
    copy, source = BUILD / file.name, fileio.read_bytes(file, fileio.MB)
    if not copy.is_file() or copy.read_bytes() != source:
        fileio.atomic_write(copy, source)
    sys.path.insert(0, str(BUILD))
    return importlib.import_module(file.stem)


def draw_prototype(module: Any, inputs: Inputs) -> Draw:
    """Its forward pass from covariances, and its backward pass as far as the image plane."""
    g = inputs.gaussians
    M = rotation_matrices(g["quats"]) * g["scales"][:, None, :]
    rows, columns = np.triu_indices(3)
    covariances = (M @ M.mT)[:, rows, columns].contiguous()
    tensors = (g["means"], covariances, g["opacities"], g["colors"], inputs.viewmat, inputs.K)
    arguments = [tensor.numpy() for tensor in tensors]
    g_image, g_alpha, black = inputs.g_image.numpy(), inputs.g_alpha.numpy(), np.zeros(3, np.float32)

    def draw() -> Drawn:
        raster = module.Raster()
        begin = time.perf_counter()
        image, _ = raster.forward(*arguments, inputs.size, inputs.size, black)
        middle = time.perf_counter()
        gradients = raster.backward(g_image, g_alpha)
        seconds = {"forward": middle - begin, "backward": time.perf_counter() - middle}
        gradient = torch.from_numpy(gradients[:, [6, 7, 8, 5]])
        return Drawn(seconds | raster.t, torch.from_numpy(image), gradient)

    return draw


def build_opensplat(checkout: Path) -> Any:
    """Compiles its CPU rasterizer with our binding, for this processor (its own build is generic, hence slower)."""
    from torch.utils import cpp_extension

    name = "opensplat_binding.cpp"
    fileio.atomic_write(BUILD / name, fileio.read_bytes(Path(__file__).with_name(name), fileio.MB))
    return cpp_extension.load(
        "opensplat_cpu",
        [str(BUILD / name), str((checkout / OPENSPLAT_SOURCE).resolve())],
        extra_cflags=["-O3", "-DNDEBUG", "-march=native"],
        extra_include_paths=[str(checkout.resolve())],
        build_directory=str(BUILD),
    )


def draw_opensplat(extension: Any, inputs: Inputs) -> Draw:
    """Sorting and compositing, and back; projected beforehand, because that is torch and not its own kernel."""
    g, K, size = inputs.gaussians, inputs.K, inputs.size
    # Clip space as OpenGL has it; any depth that grows with z will do, it is only sorted by.
    clip = torch.tensor([[2 * K[0, 0] / size, 0, 0, 0], [0, 2 * K[1, 1] / size, 0, 0], [0, 0, 1, -1], [0, 0, 1, 0]])
    focal = (float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]))
    xys, _, conics, covariances, depths = extension.project(
        g["means"], g["scales"], g["quats"], inputs.viewmat, clip @ inputs.viewmat, *focal, size, size
    )
    # The depths are a strided view, which its compositing would read as if it were contiguous, and sort wrongly.
    splats = (xys, conics, g["colors"], g["opacities"], torch.zeros(3), covariances, depths.contiguous())

    def draw() -> Drawn:
        begin = time.perf_counter()
        image, transmittance, lists = extension.forward(size, size, *splats)
        middle = time.perf_counter()
        gradients = extension.backward(size, size, *splats, transmittance, lists, inputs.g_image, inputs.g_alpha)
        seconds = {"forward": middle - begin, "backward": time.perf_counter() - middle}
        return Drawn(seconds, image, torch.cat(gradients[2:], -1))

    return draw
