"""OpenEXR: one picture as compositors take it, scene-linear, half float, premultiplied, depth as Z.

Needs OpenEXR 3.5 or newer (extra `exr`).
"""

from __future__ import annotations

import io

import numpy as np

from d2 import machine

NOTHING = 1e10  # depth where there is nothing, as Blender writes it
_VISIBLE = 1 / 255  # alpha below which there is nothing


def encode(
    rgba: np.ndarray,  # float [H, W, 4] straight alpha, display-referred (sRGB)
    depth: np.ndarray | None = None,  # [H, W] world, along the optical axis
) -> bytes:
    """Channels R G B A in half, Z in float; colours are decoded to linear light, then premultiplied."""
    OpenEXR = require()
    alpha = rgba[..., 3:]
    premultiplied = np.concatenate([linear(rgba[..., :3]) * alpha, alpha], -1)
    channels = {"RGBA": np.ascontiguousarray(premultiplied, np.float16)}
    if depth is not None:
        channels["Z"] = np.ascontiguousarray(np.where(alpha[..., 0] > _VISIBLE, depth, NOTHING), np.float32)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, "software": "d2"}
    buffer = io.BytesIO()
    OpenEXR.File(header, channels).write(buffer)
    return buffer.getvalue()


def linear(display: np.ndarray) -> np.ndarray:
    """Linear light of sRGB-encoded values; the curve goes on beyond 1."""
    positive = np.maximum(display, 0)
    return np.where(positive <= 0.04045, positive / 12.92, ((positive + 0.055) / 1.055) ** 2.4)


def require():
    """The module, or SetupError with the line that installs it."""
    return machine.require("OpenEXR", "OpenEXR")
