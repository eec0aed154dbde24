"""Reconstructions made up for the viewer's tests, and opening their pages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2 import camera
from d2.recon.dataset import Dataset
from d2.recon.gaussians import Gaussians4D
from d2.recon.viewer import reference

FRAMES, FPS = 5, 10.0


def random_asset(count: int, degree: int = 0, seed: int = 0) -> Gaussians4D:
    """A ball of moving Gaussians around the origin, some of them short-lived."""
    g = torch.Generator().manual_seed(seed)
    return Gaussians4D(
        means=0.3 * torch.randn(count, 3, generator=g),
        velocities=0.2 * torch.randn(count, 3, generator=g),
        times=1.2 * torch.rand(count, generator=g) - 0.1,
        log_durations=torch.log(0.1 + torch.rand(count, generator=g)),
        quats=torch.randn(count, 4, generator=g),
        log_scales=0.5 * torch.randn(count, 3, generator=g) - 3.5,
        opacity_logits=torch.randn(count, generator=g) + 1,
        sh=0.5 * torch.randn(count, (degree + 1) ** 2, 3, generator=g),
    )


def finished_reconstruction(root: Path) -> Path:
    """<root>/recon/main with a model, five frames at ten a second, a log and reference pictures."""
    folder = root / "recon" / "main"
    random_asset(1500).save(folder / "gaussians.safetensors", {"fps": f"{FPS:g}", "frames": str(FRAMES)})
    reference.save(folder, tiny_views())
    lines = [{"iteration": k * 100, "loss": 0.1 / k, "psnr_heldout": 20.0 + k} for k in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    return folder


def tiny_views(views: int = 4, side: int = 32) -> Dataset:
    """Four cameras around the origin; every picture is a disc whose grey tells view and frame."""
    rig = camera.orbit(views, elevation_deg=15, radius=2.5, width=side, height=side)
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    disc = np.hypot(x, y) < side / 3
    pictures = np.zeros((views, FRAMES, side, side, 4), np.uint8)
    for view in range(views):
        for frame in range(FRAMES):
            pictures[view, frame][disc] = (60 * view, 50 * frame, 100, 255)
    count = views * FRAMES
    return Dataset(
        images=torch.from_numpy(pictures.reshape(count, side, side, 4)),
        viewmats=torch.from_numpy(rig.viewmats).float().repeat_interleave(FRAMES, 0),
        Ks=torch.from_numpy(rig.K).float().expand(count, 3, 3),
        times=torch.linspace(0, 1, FRAMES).repeat(views),
        views=torch.arange(views).repeat_interleave(FRAMES),
        has_alpha=True, background=torch.ones(3), plain_background=True,
        names=tuple(str(k) for k in range(count)),
    )  # fmt: skip


@contextlib.contextmanager
def opened(
    browser: Any, page: Path | str, query: str = "?autoplay=0", width: int = 256, height: int = 256, **options: Any
) -> Iterator[Any]:
    """The page in a fresh context, once it shows something; fails on any console message, error or foreign request."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    tab, faults = context.new_page(), []
    address = page if isinstance(page, str) else page.absolute().as_uri()
    tab.on("console", lambda message: faults.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: faults.append(f"error: {error}"))
    tab.on("request", lambda request: None if _own(request.url, address) else faults.append(f"request: {request.url}"))
    try:
        tab.goto(address + query)
        tab.wait_for_selector("html.ready", timeout=20_000)
        yield tab
        assert faults == []
    finally:
        context.close()


def _own(url: str, address: str) -> bool:
    return url.startswith(("blob:", "data:")) or url.partition("?")[0].rpartition("/")[0] == address.rpartition("/")[0]
