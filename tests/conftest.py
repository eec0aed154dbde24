import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import draw_ball, single_thread, write_pair

import d2


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
