"""The viewer as an export: one HTML file to double-click or to mail, or a folder for a web site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d2 import fileio
from d2.recon.viewer import about, pack, page

if TYPE_CHECKING:
    from d2.recon.exports import Clip

BINARY = "asset.bin"  # beside index.html


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
    told = about.about(clip.gaussians, clip.name, clip.fps, len(clip.times), clip.folder, clip.run)
    asset = pack.pack(clip.gaussians, degree=min(1, clip.gaussians.sh_degree))
    return told, asset, about.poster(clip.gaussians, told["home"])
