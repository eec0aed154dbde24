"""The smallest whole run of each stage, for the campaigns that interrupt, damage and repeat it."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from d2 import camera, fileio, generation
from d2.recon import exports, pipeline
from d2.run import Run

TESTS = Path(__file__).resolve().parent.parent / "tests"
SETS = (
    "iterations=6", "start_gaussians=60", "max_gaussians=80", "validate_every=2", "holdout=2",
    "correct_colors=false", "correct_poses=false",
)  # fmt: skip
FORMATS = ("ply", "spz", "splat", "glb", "usd", "html", "contact")
VIEWS, FRAMES, SIZE = 4, 3, 24
Stop = Callable[[], int]


class Stage(abc.ABC):
    """One stage on inputs in `place`; its work goes to a folder of the caller's choice."""

    def __init__(self, place: Path):
        self.place = place

    @abc.abstractmethod
    def prepare(self) -> None:
        """Makes the inputs."""

    @abc.abstractmethod
    def work(self, out: Path, should_stop: Stop = lambda: 0, processes: int = 1) -> None:
        """Does the whole stage, or goes on with what lies at `out`. Raises what d2 raises."""

    @abc.abstractmethod
    def done(self, out: Path) -> bool:
        """Whether the folder says that the stage is finished."""

    @abc.abstractmethod
    def result(self, out: Path) -> dict[str, str]:
        """sha256 of every file that the stage is for."""


class Generate(Stage):
    """A picture to a matrix of 3 × 3 with a random pair, three steps."""

    def prepare(self) -> None:
        pair = tiny_pair()
        pair.write_pair(self.place / "weights")
        pair.draw_ball(self.place / "ball.png", 30, 60)

    def work(self, out: Path, should_stop: Stop = lambda: 0, processes: int = 1) -> None:
        weights = self.place / "weights"
        options = {"should_stop": should_stop, "processes": processes, "sets": ("size=32", "rank_timeout=8")}
        generation.generate(self.place / "ball.png", out, preset=weights / "preset.yaml", weights=weights, **options)

    def done(self, out: Path) -> bool:
        return (out / "run.json").exists() and Run.open(out).stage("generate") is not None

    def result(self, out: Path) -> dict[str, str]:
        return digests(out, "images/**/*.png", "generate/reference*/*.png", "generate/config.yaml", "*.json", "*.png")


class Reconstruct(Stage):
    """A run with pictures of a ball to 4D Gaussians, six steps."""

    def prepare(self) -> None:
        matrix_run(self.place / "source")

    def work(self, out: Path, should_stop: Stop = lambda: 0, processes: int = 1) -> None:
        pipeline.reconstruct(self.place / "source", out, sets=SETS, device="cpu", should_stop=should_stop)

    def done(self, out: Path) -> bool:
        return (out / "run.json").exists() and Run.open(out).stage("reconstruct:main") is not None

    def result(self, out: Path) -> dict[str, str]:
        return digests(out, "*.json", *(f"recon/main/{name}" for name in (pipeline.MODEL, "*.json*", "*.yaml")))


class Export(Stage):
    """A reconstruction to files of every common kind; what is there is replaced."""

    def prepare(self) -> None:
        matrix_run(self.place / "run")
        pipeline.reconstruct(self.place / "run", sets=SETS, device="cpu")

    def work(self, out: Path, should_stop: Stop = lambda: 0, processes: int = 1) -> None:
        exports.export(self.place / "run", FORMATS, out, frames=3, size=64, overwrite=True)

    def done(self, out: Path) -> bool:
        return (out / "README.txt").exists()  # written last

    def result(self, out: Path) -> dict[str, str]:
        return {name: sha for name, sha in digests(out, "**/*").items() if not Path(name).name.startswith(".")}


STAGES: dict[str, type[Stage]] = {"generate": Generate, "reconstruct": Reconstruct, "export": Export}


def matrix_run(folder: Path) -> Run:
    """A run folder with a finished matrix: a ball that shrinks, seen from four sides."""
    run = Run.create(folder)
    write_ball(run)
    return run


def write_ball(run: Run, green: int = 90) -> None:
    """The matrix of `matrix_run`, or one of another colour."""
    rig = camera.orbit(VIEWS, width=SIZE, height=SIZE)
    rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5

    def cell(v: int, f: int) -> np.ndarray:
        inside = np.hypot(rows, columns) < 8 - f
        shade = (128 + 8 * columns + 20 * v).clip(0, 255)
        return np.dstack([shade, np.full_like(shade, green), 255 - shade, inside * 255.0]).astype(np.uint8)

    run.write_matrix(cell, FRAMES, rig, {})


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """sha256 of the files that match, by their path below the folder."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): fileio.sha256(path) for path in sorted(paths)}


def tiny_pair() -> ModuleType:
    """The tests' pair of random checkpoints."""
    spec = importlib.util.spec_from_file_location("tiny_pair", TESTS / "tiny_pair.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
