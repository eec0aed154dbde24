"""Fixtures that all tests share: data outside the repository, a tiny dataset, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("faults.assertions")

import faults.examples  # noqa: E402, F401  (pytest is told of its profile before it collects tests)
from faults.assertions import Outcome  # noqa: E402
from faults.rows import (  # noqa: E402, F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)
from surroundings import ROOT, cli_environment  # noqa: E402
from tiny_pair import draw_ball, single_thread, write_pair  # noqa: E402

import d2  # noqa: E402
from d2 import camera, images  # noqa: E402

SIZE = 32  # pixels of a tiny image
VIEWS, FRAMES, TEST_VIEWS = 6, 4, 3
RADIUS, FOV = 3.0, 40.0  # world, degrees


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are no names: a gzip stream holds the time, and every process that runs the tests must know them alike."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def _a_process_like_any_other() -> None:
    """As many processes as cores run the tests: threads of theirs would only wait for each other."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    numba.set_num_threads(1)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and fixtures that do not ship with the project: $D2_SHARED, or ../shared beside the repository."""
    folder = Path(os.environ.get("D2_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set D2_SHARED to the folder with the recorded data and fixtures")
    return folder


@pytest.fixture
def tiny_dataset(_tiny_dataset_once: Path, tmp_path: Path) -> Path:
    """A folder with transforms_train.json (6 views × 4 frames) and transforms_test.json (3 views, in-between
    times) of two analytic balls, one moving: 32² RGBA PNGs. A copy of its own for every test."""
    return Path(shutil.copytree(_tiny_dataset_once, tmp_path / "balls"))


@pytest.fixture(scope="session")
def _tiny_dataset_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "balls"
    train = camera.orbit(VIEWS, elevation_deg=15, radius=RADIUS, fov_deg=FOV, width=SIZE, height=SIZE)
    test = camera.orbit(TEST_VIEWS, elevation_deg=35, radius=RADIUS, fov_deg=FOV, width=SIZE, height=SIZE)
    write_balls(folder, "train", train, [f / (FRAMES - 1) for f in range(FRAMES)])
    write_balls(folder, "test", test, [0.5])
    return folder


def write_balls(folder: Path, split: str, rig: camera.Rig, times: list[float]) -> None:
    """One split of the tiny dataset: a PNG for every view and time, and its transforms file."""
    frames = []
    for v, (c2w, viewmat) in enumerate(zip(rig.c2w, rig.viewmats, strict=True)):
        for f, time in enumerate(times):
            name = f"{split}/v{v:02d}_f{f:03d}.png"
            images.write_png(folder / name, draw_balls(viewmat, rig, time))
            frames.append({"file_path": name, "transform_matrix": c2w.tolist(), "time": time})
    meta = {"camera_angle_x": rig.fov, "w": rig.width, "h": rig.height, "frames": frames}
    (folder / f"transforms_{split}.json").write_text(json.dumps(meta))


def draw_balls(viewmat: np.ndarray, rig: camera.Rig, time: float) -> np.ndarray:  # -> [H, W, 4] uint8
    """Two balls by ray and sphere: a still one, and one that flies along x; colour follows the surface normal."""
    x, y = np.meshgrid(np.arange(rig.width) + 0.5, np.arange(rig.height) + 0.5)
    rays = np.stack([(x - rig.width / 2) / rig.focal, (y - rig.height / 2) / rig.focal, np.ones_like(x)], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    picture = np.zeros((rig.height, rig.width, 4))  # premultiplied
    balls = [([0.0, 0.0, -0.2], 0.4), ([0.8 * time - 0.4, 0.0, 0.4], 0.25)]
    seen = [(viewmat[:3, :3] @ centre + viewmat[:3, 3], radius) for centre, radius in balls]
    for c, radius in sorted(seen, key=lambda ball: -ball[0][2]):
        along = rays @ c
        missed = np.linalg.norm(along[..., None] * rays - c, axis=-1)
        depth = along - np.sqrt(np.maximum(radius**2 - missed**2, 0))
        normal = (depth[..., None] * rays - c) @ viewmat[:3, :3] / radius
        coverage = np.clip((radius - missed) * rig.focal / c[2] + 0.5, 0, 1)[..., None]
        front = np.concatenate([0.5 + 0.4 * normal, np.ones_like(coverage)], -1)
        picture = front * coverage + picture * (1 - coverage)
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-6)
    return images.to_uint8(picture)


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., Outcome]:
    """`run_cli("info", path, env={...}, cwd=...)`: the d2 command in a process of its own, in an empty folder."""

    def run(
        *words: str | Path, env: dict[str, str] | None = None, cwd: Path = tmp_path, timeout: float = 120
    ) -> Outcome:
        command = [sys.executable, "-m", "d2.cli", *map(str, words)]
        env = cli_environment() | (env or {})
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=timeout)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny pair of random checkpoints and preset.yaml."""
    folder = tmp_path_factory.mktemp("tiny")
    write_pair(folder)
    return folder


@pytest.fixture
def one_thread():
    with single_thread():
        yield


@pytest.fixture
def generate(tiny, one_thread) -> Callable[..., Any]:
    """d2.generate with the tiny pair."""

    def call(source: Path, out: Path, **options: Any) -> Any:
        return d2.generate(source, out, **({"preset": tiny / "preset.yaml", "weights": tiny} | options))

    return call


@pytest.fixture(scope="session")
def ball(tmp_path_factory) -> Path:
    """An RGBA picture of a ball, taller than wide."""
    path = tmp_path_factory.mktemp("input") / "ball.png"
    draw_ball(path, 30, 60)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A folder of three frames in which the ball falls."""
    folder = tmp_path_factory.mktemp("input") / "clip"
    for i, y in enumerate((20, 50, 80)):
        draw_ball(folder / f"frame_{i}.png", 30, y)
    return folder


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory, tiny, clip) -> Path:
    """A finished run of the clip, to be copied."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with single_thread():
        d2.generate(clip, folder, preset=tiny / "preset.yaml", weights=tiny)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A finished run of the clip."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))
