from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pair import write_pair

import d2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny pair of random checkpoints and preset.yaml."""
    folder = tmp_path_factory.mktemp("tiny")
    write_pair(folder)
    return folder


@pytest.fixture
def one_thread():
    """Bits depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def draw_ball(path: Path, x: float, y: float, radius: float = 12, size: tuple[int, int] = (60, 100)) -> None:
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    alpha = np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1) * 255
    rgba = np.dstack([np.full_like(alpha, 200), rows * 2.0, columns * 3.0, alpha]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgba).save(path)
