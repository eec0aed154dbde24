"""PLY, SPZ and GLB as renderers that we did not write draw them in a browser, against our own pictures.

Needs chromium, playwright, and node modules: $D2_NODE_MODULES (make test-dcc fetches them).
"""

from __future__ import annotations

import base64
import functools
import http.server
import io
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2 import camera
from d2 import config as configuration
from d2.recon import dataset, drawing, train
from d2.recon.config import ReconstructConfig
from d2.recon.exports import export
from d2.recon.formats.frames import FROM_WORLD
from d2.recon.gaussians import Gaussians4D

pytestmark = pytest.mark.dcc
SIZE, FOV = 256, math.radians(40)  # pixels, rad
# dB.  PlayCanvas lets every Gaussian end where it has fallen to exp(-4), and lifts it down to nothing there.
LEAST = {"spark": 38.0, "playcanvas": 35.0}
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = "--headless=new --no-sandbox --use-angle=swiftshader --enable-unsafe-swiftshader --no-first-run"


def scattered(count: int = 1500) -> Gaussians4D:
    """Anything that a file can hold."""
    g = torch.Generator().manual_seed(4)
    return Gaussians4D(
        means=0.35 * torch.randn(count, 3, generator=g), velocities=0.2 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g), log_durations=torch.zeros(count),
        quats=torch.randn(count, 4, generator=g), log_scales=0.4 * torch.randn(count, 3, generator=g) - 3.2,
        opacity_logits=torch.randn(count, generator=g) + 1, sh=0.6 * torch.randn(count, 1, 3, generator=g),
    )  # fmt: skip


def panda() -> Gaussians4D:
    """What users export: a fit of the data that ships with the project."""
    data = dataset.load(ROOT / "tests/data/panda")
    sets = {"iterations": 500, "start_gaussians": 6000, "max_gaussians": 6000, "validate_every": 500}
    settings = configuration.load(ReconstructConfig, sets)
    return train.fit(train.start(data, settings, "cpu"), data, settings)


@pytest.fixture(scope="module", params=[scattered, panda], ids=lambda make: make.__name__)
def asset(request: pytest.FixtureRequest) -> Gaussians4D:
    return request.param()


@pytest.fixture(scope="module")
def site(asset, tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A folder with the pages, the node modules and our exports, and its address on this machine."""
    modules = Path(os.environ.get("D2_NODE_MODULES", "node_modules"))
    if not (modules / "three").is_dir() or not (modules / "playcanvas").is_dir():
        pytest.skip("no node modules: $D2_NODE_MODULES does not hold three, @sparkjsdev/spark and playcanvas")
    folder = tmp_path_factory.mktemp("site")
    for name in ("three", "@sparkjsdev", "playcanvas"):
        (folder / name).symlink_to((modules / name).resolve())
    for page in HERE.glob("*.html"):
        shutil.copy(page, folder)
    export(asset, ["ply", "spz", "glb"], folder / "out", time=0.5)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

        def log_message(self, *words: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    program = os.environ.get("D2_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium: apt-get install --no-install-recommends chromium, or set D2_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield opened
        opened.close()


@pytest.mark.parametrize(
    ("page", "file", "axes"),
    [
        ("spark", "asset.ply", "rdf"),
        ("spark", "asset.spz", "rub"),
        ("spark", "asset.glb", "rub"),
        ("playcanvas", "asset.glb", "rub"),
    ],
)
def test_a_second_renderer_draws_what_ours_draws(asset, site, browser, page, file, axes, record_property):
    _, address = site
    for azimuth, elevation in ((0.0, 0.2), (2.1, -0.3)):
        rig = camera.Rig(np.array([azimuth]), np.array([elevation]), 3.5, FOV, SIZE, SIZE)
        ours = next(drawing.render_views(asset, rig.c2w, rig.K, SIZE, SIZE, [0.5], drawing.WHITE))[..., :3].clip(0, 1)
        matrix = rig.c2w[0].copy()
        matrix[:3] = FROM_WORLD[axes] @ matrix[:3]
        tab = browser.new_page(viewport={"width": SIZE, "height": SIZE})
        faults: list[str] = []
        tab.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
        tab.goto(f"{address}/{page}.html")
        tab.wait_for_function("window.ready", timeout=60_000)
        wish = {"file": f"/out/{file}", "matrix": matrix.flatten().tolist(), "fov": math.degrees(FOV), "size": SIZE}
        drawn = tab.evaluate("wish => draw(wish)", wish)
        tab.close()
        assert faults == []
        picture = Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))).convert("RGB")
        theirs = np.asarray(picture, float) / 255
        psnr = -10 * np.log10(((theirs - ours) ** 2).mean())
        record_property("psnr", round(float(psnr), 1))
        if "D2_DCC_PICTURES" in os.environ:
            both = (np.concatenate([theirs, ours], 1) * 255).astype(np.uint8)
            Image.fromarray(both).save(
                Path(os.environ["D2_DCC_PICTURES"]) / f"{page}_{Path(file).suffix[1:]}_{len(asset)}.png"
            )
        assert theirs.shape == (SIZE, SIZE, 3) and psnr >= LEAST[page]
