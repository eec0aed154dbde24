"""The viewer as an export: one HTML file to double-click or to mail, or a folder for a web site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2 import fileio
from d2.recon.gaussians import Gaussians4D
from d2.recon.viewer import about, pack, page

if TYPE_CHECKING:
    from d2.recon.exports import Clip

BINARY = "asset.bin"  # beside index.html
LASTING = 5.0  # ln of the duration of what does not move


def write_html(clip: Clip, target: Path) -> None:
    """Everything in one file that needs no network."""
    told, asset, poster = _parts(clip)
    fileio.atomic_write(target, page.page(clip.name, told, asset, poster).encode())
    clip.progress("html", 1, 1)


def write_web(clip: Clip, target: Path) -> None:
    """index.html with the binary beside it, which browsers fetch and cache apart; for http, not for file://."""
    told, asset, poster = _parts(clip)
    fileio.atomic_write(target.parent / BINARY, asset)
    fileio.atomic_write(target, page.page(clip.name, told | {"asset": BINARY}, None, poster).encode())
    clip.progress("web", 1, 1)


def _parts(clip: Clip) -> tuple[dict, bytes, str]:
    gaussians = frozen(clip.gaussians, float(clip.times[0])) if clip.still else clip.gaussians
    told = about.about(gaussians, clip.name, clip.fps, len(clip.times), clip.folder, clip.run)
    asset = pack.pack(gaussians, degree=min(1, gaussians.sh_degree))
    return told, asset, about.poster(gaussians, told["home"])


def frozen(gaussians: Gaussians4D, t: float) -> Gaussians4D:
    """What there is at one moment, at all times."""
    moment = gaussians.at(t)
    return replace(
        gaussians,
        means=moment.means,
        velocities=torch.zeros_like(moment.means),
        times=torch.full_like(moment.opacities, 0.5),
        log_durations=torch.full_like(moment.opacities, LASTING),
        opacity_logits=torch.logit(moment.opacities, eps=1e-6),
    )
