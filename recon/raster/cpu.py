"""The CPU rasterizer: numba kernels behind one autograd function for one (view, time) pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from d2.errors import NumericalError
from d2.recon.raster import project as p
from d2.recon.raster import tiles


class Camera(NamedTuple):
    """What does not change while a picture is drawn."""

    K: Tensor  # [3, 3] pixels
    width: int
    height: int
    near_plane: float
    far_plane: float
    eps2d: float
    t: float
    antialiased: bool


_NAMES = ("means", "quats", "scales", "opacities", "colors", "velocities", "times", "durations", "screen")


class _Splat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, camera: Camera, viewmat: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """tensors: those of _NAMES."""
        arrays = [_float32(tensor) for tensor in tensors]
        N = len(arrays[0])
        c = p.pack_camera(_float32(viewmat), camera.K.numpy(), *camera[1:])
        if not np.isfinite(c).all():
            raise NumericalError("rasterize: the camera (viewmats, Ks or t) is not finite")
        splats, rects = np.empty((N, p.SPLAT_FLOATS), np.float32), np.empty((N, 4), np.int32)
        keys = np.empty(N, np.uint64)
        p.project(*arrays, c, splats, rects, keys)
        front_to_back = np.sort(keys)
        drawn = np.searchsorted(front_to_back, p.POISONED)
        if drawn < N and front_to_back[drawn] == p.POISONED:
            _refuse_poison(arrays, int(np.argmax(keys == p.POISONED)))
        order = (front_to_back[:drawn] & np.uint64(0xFFFFFFFF)).astype(np.int64)

        tiles_x, tiles_y = -(-camera.width // tiles.TILE), -(-camera.height // tiles.TILE)
        lists = tiles.bin_splats(order, rects, keys, tiles_x, tiles_y, numba.get_num_threads())
        offsets, ids, _, _ = lists
        image = np.empty((camera.height, camera.width, 3), np.float32)
        transmittance = np.empty((camera.height, camera.width), np.float32)
        tiles.composite(offsets, ids, rects, splats, image, transmittance)

        ctx.arrays, ctx.camera = arrays, c
        ctx.lists = (*lists, rects, splats, transmittance)
        ctx.dtypes = [viewmat.dtype, *(tensor.dtype for tensor in tensors)]
        result = torch.from_numpy(image)
        ctx.save_for_backward(result)  # so that writing into it before backward is an error, not a wrong gradient
        return result, torch.from_numpy(1 - transmittance)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_image: Tensor, g_alpha: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        means, quats, scales, opacities, _, velocities, times, durations, _ = ctx.arrays
        offsets, ids, slots, starts, rects, splats, transmittance = ctx.lists
        (image,) = ctx.saved_tensors
        rows = np.empty((len(ids), p.SPLAT_FLOATS), np.float32)
        tiles.composite_backward(
            offsets, ids, slots, rects, splats, image.numpy(), transmittance,
            _float32(g_image), _float32(g_alpha), rows,
        )  # fmt: skip
        grads = [np.zeros_like(array) for array in ctx.arrays]
        wants_view = ctx.needs_input_grad[1]
        g_views = np.zeros((len(means) if wants_view else 0, 12), np.float32)
        p.project_backward(
            means, quats, scales, opacities, velocities, times, durations, ctx.camera, starts, rows,
            *grads, g_views,
        )  # fmt: skip
        g_viewmat = None
        if wants_view:
            g_viewmat = torch.zeros(4, 4)
            g_viewmat[:3] = torch.from_numpy(g_views.sum(0, dtype=np.float64).reshape(3, 4))
        tensors = [g_viewmat, *map(torch.from_numpy, grads)]
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(tensors, ctx.dtypes, strict=True))


def splat(
    means: Tensor,  # [N, 3] world, at `times`
    quats: Tensor,  # [N, 4] wxyz, any length
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    colors: Tensor,  # [N, 3]
    velocities: Tensor,  # [N, 3]
    times: Tensor,  # [N]
    durations: Tensor,  # [N]
    screen: Tensor,  # [N, 2] added to the projected means: its gradient is the image-plane gradient
    viewmat: Tensor,  # [4, 4] world to camera, OpenCV
    camera: Camera,
) -> tuple[Tensor, Tensor]:
    """Image [H, W, 3] without background and alpha [H, W].

    Raises NumericalError naming the first Gaussian with a parameter that is NaN or infinite.
    """
    arguments = (means, quats, scales, opacities, colors, velocities, times, durations, screen)
    return _Splat.apply(camera, viewmat, *arguments)  # type: ignore[return-value]


def _refuse_poison(arrays: list[np.ndarray], i: int) -> None:
    """Raises NumericalError naming the parameter of Gaussian i that cannot be drawn."""
    for name, array in zip(_NAMES, arrays, strict=True):
        if name == "durations" and not array[i] > 0:
            raise NumericalError(f"rasterize: durations[{i}] is {array[i]}, not above 0")
        if name != "durations" and not np.isfinite(array[i]).all():
            raise NumericalError(f"rasterize: {name}[{i}] is not finite")
    raise AssertionError("a Gaussian was called poisoned without reason")


def _float32(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)
