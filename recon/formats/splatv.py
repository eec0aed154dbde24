""".splatv, the moving splats of the splaTV web viewer: 64-byte texels with polynomial motion.

Our constant velocity is its linear term, the others are zero; its opacity is exp(-(Δt/s)²), so s = √2 · duration.
Degree 0 only.  Written, not read: the page is the only program that opens it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from d2 import fileio
from d2.recon.formats import values
from d2.recon.formats.frames import FROM_WORLD, Frame, move
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import sh as spherical

MAGIC = 0x674B
WIDTH = 4096  # texels of 16 bytes in a row of the page's texture: 1024 Gaussians
WORDS = 16  # u32 a Gaussian
_CAMERA = {"width": 1024, "height": 1024, "fx": 1100.0, "fy": 1100.0}  # pixels, of the opening view
_HALF_MAX = 65504.0


def write(gaussians: Gaussians4D, path: str | Path, frame: Frame = "rdf") -> None:
    """Writes the clip, whole or not at all; the errors are those of `encode`."""
    fileio.atomic_write(path, encode(gaussians, frame))


def encode(gaussians: Gaussians4D, frame: Frame = "rdf") -> bytes:
    """The bytes of a .splatv file; the page plays its times 0..1.

    Raises InputError when there is nothing to write and NumericalError when a value is NaN or infinite.
    """
    moved = move(gaussians, FROM_WORLD[frame])
    texels = _texels(moved)
    rows = -(-len(texels) * WORDS // (4 * WIDTH))
    padded = np.zeros((rows * WIDTH * 4 // WORDS, WORDS), "<u4")
    padded[:, 15] = _halves(np.array([[0.0, 1.0]]))[0]  # a duration, so that the page divides by none
    padded[: len(texels)] = texels
    chunk = {"type": "splat", "size": padded.nbytes, "texwidth": WIDTH, "texheight": rows}
    center, distance = _view(moved)
    camera = {"id": 0, "img_name": "front", "position": [*center[:2], center[2] - distance]}
    turn = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
    head = json.dumps([chunk | {"cameras": [camera | {"rotation": turn} | _CAMERA]}]).encode()
    return struct.pack("<II", MAGIC, len(head)) + head + padded.tobytes()


def _texels(gaussians: Gaussians4D) -> np.ndarray:  # uint32 [N, 16]
    v = values.of(gaussians.at(0.0))
    g = gaussians.map(lambda tensor: tensor.detach().cpu().double())
    velocity, durations = g.velocities.numpy(), g.log_durations.exp().numpy()
    texels = np.zeros((len(v.means), WORDS), "<u4")
    texels[:, 0:3] = np.ascontiguousarray(g.means.numpy(), "<f4").view("<u4")
    texels[:, 3:5] = _halves(v.quats)
    texels[:, 5:7] = _halves(np.column_stack([v.scales, np.zeros(len(v.scales))]))
    drawn = (g.quats != 0).any(1).numpy()
    rgba = np.column_stack([0.5 + spherical.C0 * v.sh[:, 0], g.opacity_logits.sigmoid().numpy() * drawn])
    texels[:, 7] = np.round(255 * rgba.clip(0, 1)).astype(np.uint8).view("<u4")[:, 0]
    texels[:, 8:10] = _halves(np.column_stack([velocity, np.zeros(len(velocity))]))
    texels[:, 15] = _halves(np.column_stack([g.times.numpy(), np.sqrt(2) * durations]))[:, 0]
    return texels


def _view(gaussians: Gaussians4D) -> tuple[list[float], float]:
    """Where the opening camera looks, and from how far: it sees what holds 98 % of the means."""
    low, high = np.quantile(gaussians.at(0.5).means.cpu().numpy(), [0.01, 0.99], axis=0)
    return (0.5 * (low + high)).tolist(), 1.6 * float(np.linalg.norm(high - low)) + 0.1


def _halves(numbers: np.ndarray) -> np.ndarray:  # [N, 2m] -> uint32 [N, m], the first number in the low half
    clipped = np.asarray(numbers).clip(-_HALF_MAX, _HALF_MAX).astype("<f2")
    return np.ascontiguousarray(clipped).view("<u4")
