"""The phases of stage 1 in a run folder: references, joint sampling, decoding; each can be stopped and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2 import cells, fileio, images, previews, snapshot
from d2.compose import needed
from d2.denoiser import Estimate, MatrixDenoiser
from d2.errors import InputError, NumericalError, ResourceError, Stopped, WorkerError
from d2.matrix import cell_path
from d2.noise import cell_noise, matrix_noise, starting_point
from d2.pair import AXES, Model, Pair, model_angles
from d2.preprocess import on_white, to_tensor
from d2.run import Run
from d2.sampler import Plan, State, alone, anchor, blend, plan, refine, sample_matrix
from d2.settings import GenerateConfig
from d2.snapshot import Snapshot

INPUT = "generate/input"
REFERENCE_VIDEO = "generate/reference_video"
REFERENCE_VIEWS = "generate/reference_views"
KEPT = "generate/kept"  # cells of the matrix that --cells samples parts of again
STATE = "generate/state.safetensors"
LIVE_PREVIEW = "generate/preview.png"


class Observer:
    """Told what happens; the command line draws progress bars from it."""

    def message(self, text: str) -> None: ...

    def phase(self, name: str, done: int, total: int) -> None: ...


@dataclass
class Job:
    """One run on its way from input pictures to a finished matrix."""

    run: Run
    settings: GenerateConfig
    pair: Pair
    basis: str  # digest of everything the references depend on
    observer: Observer
    should_stop: Callable[[], int]
    resume_command: str
    redo: cells.Redo | None = None  # what is sampled again of a finished matrix, whose cells lie in KEPT

    def references(self) -> None:
        """Phase 1: what the run folder lacks of reference views and reference video is sampled and saved."""
        c = self.settings
        pictures = self._paths(INPUT, "f")
        moving = pictures[1].is_file()
        first = read_picture(pictures[anchor(c, c.frames) if moving else 0], c.size)
        if not _complete(self._paths(REFERENCE_VIEWS, "v")):
            self._write(REFERENCE_VIEWS, "v", [*self._sample_line("view", first)[:-1], first])
        if not _complete(self._paths(REFERENCE_VIDEO, "f")):
            self._write(REFERENCE_VIDEO, "f", self._sample_line("frame", first))

    def matrix(self) -> Tensor:  # [V, F, C, h, w]
        """Phase 2: the joint loop, conditioned on the reference pictures as they lie in the folder."""
        c = self.settings
        video, views = self._paths(REFERENCE_VIDEO, "f"), self._paths(REFERENCE_VIEWS, "v")
        basis = _digest(self.basis, [fileio.sha256(path) for path in (*video, *views)])
        saved = self._saved("matrix", basis)
        worked_out = plan(c, model_angles(c.views), c.frames)
        if saved and saved.iteration == c.freeinit_matrix - 1 and saved.state.step == c.steps:
            return saved.state.x
        use = [needed(worked_out.weights(step), c.uc_type) for step in range(c.steps)]
        known = self._known_latents() if self.redo else None
        around = self._view_latents(views) if c.noise_from_mv else torch.empty(0)
        columns = self._lines("view", video, worked_out, known) if any(view for view, _ in use) else None
        rows = self._lines("frame", views, worked_out, known) if any(frame for _, frame in use) else None

        def start(noise: Tensor) -> Tensor:
            if self.redo and known is not None:
                return cells.kept_start(noise, float(worked_out.sigmas[0]), known, self.redo.mask(c.views, c.frames))
            return worked_out.start(noise, around).x

        return self._sample("matrix", worked_out, columns, rows, c.freeinit_matrix, saved, basis, start)

    def draw(self, latents: Tensor, record: dict[str, Any]) -> None:  # [V, F, C, h, w]
        """Decodes every row, writes cells, previews and cameras, and commits the stage."""
        c = self.settings
        self.pair.release()
        thumbnails = previews.Thumbnails(c.views, c.frames)
        row: list[np.ndarray] = []

        anew = self.redo.mask(c.views, c.frames) if self.redo else torch.ones(c.views, c.frames, dtype=torch.bool)
        decoded = self.pair.decode_rows(latents[anew.any(1)], c.decode_chunk)

        def cell(v: int, f: int) -> np.ndarray:
            if f == 0:
                self.stop_if_asked(f"stopped before view {v} of {c.views} was drawn")
                self.observer.phase("decode", v, c.views)
                row[:] = _pictures(next(decoded)) if anew[v].any() else []
            if not anew[v, f]:
                kept, _ = images.read_rgba(self.run.folder / KEPT / cell_path(v, f))
                thumbnails.add(v, f, on_white(Image.fromarray(kept)))
                return kept
            thumbnails.add(v, f, row[f])
            return previews.alpha_from_white(row[f])

        def finish() -> None:
            thumbnails.write_sheet(self.run.folder / "contact.png")
            thumbnails.write_video(self.run.folder / "preview.mp4", c.preview_fps, self.observer.message)

        references = {
            path.relative_to(self.run.folder).as_posix(): fileio.sha256(path)
            for path in (*self._paths(REFERENCE_VIDEO, "f"), *self._paths(REFERENCE_VIEWS, "v"))
        }
        record = record | {"alpha": "estimated against the white background", "references": references}
        if self.pair.in_flight:
            record["in_flight"] = self.pair.in_flight
        self.run.write_matrix(cell, c.frames, c.rig, record, finish)
        self.observer.phase("decode", c.views, c.views)
        fileio.remove(self.run.folder / STATE)
        fileio.remove(self.run.folder / LIVE_PREVIEW)
        fileio.remove(self.run.folder / KEPT)

    def _sample_line(self, model: Model, picture: np.ndarray) -> list[np.ndarray]:  # [H, W, 3] uint8 all
        """One model on its own: a matrix of one column or of one row."""
        c = self.settings
        view = model == "view"
        worked_out = plan(alone(c, model), model_angles(c.views) if view else torch.zeros(1), 1 if view else c.frames)
        phase = "views" if view else "video"
        saved = self._saved(phase, self.basis)
        conditions = self._conditions(model, [picture], phase)
        levels = worked_out.guided_from(model), worked_out.shallow_at(model)
        line = self.pair.lines(model, conditions, 1, None, *levels)
        models = (line, None) if view else (None, line)
        sigma = float(worked_out.sigmas[0])

        def start(noise: Tensor) -> Tensor:
            return starting_point(noise, sigma)

        x = self._sample(phase, worked_out, *models, c.freeinit_references, saved, self.basis, start)
        return _pictures(self.pair.first_stage(model).decode(x.flatten(0, 1), c.decode_chunk))

    def _lines(
        self,
        model: Model,
        references: list[Path],
        worked_out: Plan,
        known: Tensor | None,  # [V, F, C, h, w], what --cells keeps
    ) -> MatrixDenoiser:
        c, axis = self.settings, AXES[model]
        together = blend(c, c.frames) if model == "view" else None
        # Columns that look at each other are denoised all, even where only some are wanted.
        lines = self.redo.along(axis) if self.redo and together is None else None
        pictures = [read_picture(path, c.size) for path in references]
        conditions = self._conditions(model, pictures, axis)
        in_flight = c.frames if together else (c.rows_in_flight if model == "frame" else c.columns_in_flight) or 1
        chosen = conditions if lines is None else [conditions[line] for line in lines]
        levels = worked_out.guided_from(model), worked_out.shallow_at(model)
        denoise = self.pair.lines(model, chosen, in_flight, together, *levels)
        if self.redo is None or known is None:
            return denoise
        return cells.keeping(denoise, known, self.redo.mask(c.views, c.frames), axis, lines)

    def _conditions(self, model: Model, pictures: list[np.ndarray], what: str):
        c = self.settings
        if model == "view":
            elevation = torch.from_numpy(c.rig.elevation)
            vector = self.pair.view_vector(elevation, model_angles(c.views), c.cond_aug_view)
        else:
            vector = self.pair.frame_vector(c.fps_id, c.motion, c.cond_aug_frame, c.frames)
        amount = c.cond_aug_view if model == "view" else c.cond_aug_frame
        self.observer.message(f"Looking at the references of the {what}")

        def noise(line: int) -> Tensor:  # [3, H, W]
            return cell_noise(c.seed, f"{what}/augment", 0, (line,), (3, c.size, c.size))

        stacked = torch.stack([to_tensor(picture) for picture in pictures])
        return self.pair.conditions(model, stacked, noise, vector, amount)

    def _view_latents(self, views: list[Path]) -> Tensor:  # [V, C, h, w]
        c = self.settings
        pictures = torch.stack([to_tensor(read_picture(path, c.size)) for path in views])
        stage = self.pair.first_stage("frame")
        return stage.encode(pictures, lambda v: cell_noise(c.seed, "encode", 0, (v,), c.latent))

    def _known_latents(self) -> Tensor:  # [V, F, C, h, w]
        """The finished matrix, encoded."""
        c = self.settings
        self.observer.message("Encoding the cells that are kept")
        stage = self.pair.first_stage("frame")
        nothing = torch.zeros(c.latent)
        rows = []
        for v in range(c.views):
            paths = [self.run.folder / KEPT / cell_path(v, f) for f in range(c.frames)]
            pictures = torch.stack([to_tensor(read_picture(path, c.size)) for path in paths])
            rows.append(stage.encode(pictures, lambda f: nothing))
        return torch.stack(rows)

    def _sample(
        self,
        phase: str,
        worked_out: Plan,
        columns: MatrixDenoiser | None,
        rows: MatrixDenoiser | None,
        iterations: int,  # of FreeInit
        saved: Snapshot | None,
        basis: str,
        begin: Callable[[Tensor], Tensor],  # N(0, 1) -> x at the first noise level, both [V, F, C, h, w]
    ) -> Tensor:  # [V, F, C, h, w]
        seed, latent = self.settings.seed, self.settings.latent
        shape = len(worked_out.share), len(worked_out.frame_guidance), latent
        sigma = float(worked_out.sigmas[0])
        count = iter(range(iterations))

        def sample(noise: Tensor) -> Tensor:
            iteration = next(count)
            if saved and iteration < saved.iteration:
                return torch.zeros_like(noise)  # already part of what the saved iteration started from
            state = saved.state if saved and iteration == saved.iteration else State(begin(noise))
            loop = _Loop(self, phase, worked_out, iteration, iterations, basis, state)
            renoise = f"{phase}/renoise/{iteration}"
            return loop.run(columns, rows, lambda step: matrix_noise(seed, renoise, step, *shape))

        mask = worked_out.low_pass(*latent[1:]) if iterations > 1 else torch.empty(0)
        start = f"{phase}/start"
        return refine(sample, lambda iteration: matrix_noise(seed, start, iteration, *shape), iterations, sigma, mask)

    def _saved(self, phase: str, basis: str) -> Snapshot | None:
        """Where this phase was interrupted; raises InputError for a damaged state."""
        path = self.run.folder / STATE
        if not path.exists():
            return None
        try:
            saved = snapshot.load(path)
        except InputError as error:
            raise InputError(f"{error}; remove it to start this phase anew, or pass --overwrite") from error
        if saved.phase != phase:
            return None
        if saved.basis != basis:
            self.observer.message("The references were changed: the matrix is sampled anew")
            return None
        self.observer.message(f"Resuming the {phase} at step {saved.state.step} of {self.settings.steps}")
        return saved

    def stop_if_asked(self, what: str) -> None:
        signum = self.should_stop()
        if signum:
            raise Stopped(f"{what}, all saved; go on with: {self.resume_command}", signum)

    def _paths(self, folder: str, letter: str) -> list[Path]:
        count, digits = (self.settings.views, 2) if letter == "v" else (self.settings.frames, 3)
        return [self.run.folder / folder / f"{letter}{i:0{digits}d}.png" for i in range(count)]

    def _write(self, folder: str, letter: str, pictures: list[np.ndarray]) -> None:
        for path, picture in zip(self._paths(folder, letter), pictures, strict=True):
            images.write_png(path, picture)


@dataclass
class _Loop:
    """One pass through the noise levels, watched: progress, saved states, previews, a way to stop."""

    job: Job
    phase: str
    plan: Plan
    iteration: int
    iterations: int
    basis: str
    state: State
    safe: State = field(init=False)  # the last one that the loop can go on from by itself, which is what is saved
    estimate: Tensor | None = None  # [V, F, C, h, w], the last clean guess, for the preview
    in_flight: dict[str, int] = field(default_factory=dict)  # what was last said about memory

    def __post_init__(self) -> None:
        self.safe = self.state

    def run(
        self, columns: MatrixDenoiser | None, rows: MatrixDenoiser | None, noise: Callable[[int], Tensor]
    ) -> Tensor:  # [V, F, C, h, w]
        start = self.state
        self._report()
        try:
            return sample_matrix(start, self.plan, columns, rows, noise, self._seen, self._together)
        except NumericalError as error:
            self._save()
            raise NumericalError(f"{error}; the state before it is saved in {self._path}") from error
        except (ResourceError, WorkerError) as error:
            self._save()
            after = f"the state before it is saved, go on with: {self.job.resume_command}"
            raise type(error)(f"{error}; {after}") from error

    def _together(
        self, views: MatrixDenoiser | None, frames: MatrixDenoiser | None, x: Tensor, sigma: float
    ) -> tuple[Estimate | None, Estimate | None]:
        found = self.job.pair.together(views, frames, x, sigma)
        last = found[1] or found[0]
        self.estimate = last.cond if last else None
        return found

    def _seen(self, state: State) -> None:
        self.state = state
        if self.plan.resumable(state.step):
            self.safe = state
        c, steps = self.job.settings, self.plan.config.steps
        self._report()
        if self.in_flight != self.job.pair.in_flight:
            self.in_flight = dict(self.job.pair.in_flight)
            fewer = ", ".join(f"{count} {axis}" for axis, count in self.in_flight.items())
            self.job.observer.message(f"Warning: memory ran out; going on with {fewer} in flight")
        whole = state.again == 0
        if whole and self.phase == "matrix" and self.estimate is not None and state.step % c.preview_every == 0:
            images.write_png(
                self.job.run.folder / LIVE_PREVIEW, previews.latent_sheet(self.estimate, *self.job.pair.colours())
            )
        stopping = bool(self.job.should_stop())
        if stopping or (whole and (state.step % c.save_every == 0 or state.step == steps)):
            self._save()
        self.job.stop_if_asked(f"stopped the {self.phase} at step {self.safe.step} of {steps}")

    def _report(self) -> None:
        passes = [self.plan.passes(step) for step in range(self.plan.config.steps)]
        done = self.iteration * sum(passes) + sum(passes[: self.state.step]) + self.state.again
        self.job.observer.phase(self.phase, done, self.iterations * sum(passes))

    def _save(self) -> None:
        snapshot.save(self._path, Snapshot(self.phase, self.iteration, self.safe, self.basis))

    @property
    def _path(self) -> Path:
        return self.job.run.folder / STATE


def read_picture(path: Path, size: int) -> np.ndarray:  # [size, size, 3] uint8
    """A reference as it lies in the run folder, on white; raises InputError for one of another size."""
    image = images.open_image(path).convert("RGBA")
    if image.size != (size, size):
        raise InputError(f"{fileio.quoted(path)} is {image.width}×{image.height}, expected {size}×{size}")
    return on_white(image)


def _pictures(decoded: Tensor) -> list[np.ndarray]:  # [T, 3, H, W] in 0..1 -> [H, W, 3] uint8 each
    if not decoded.isfinite().all():
        raise NumericalError("the decoder's pictures are not finite")
    return list(images.to_uint8(decoded.permute(0, 2, 3, 1).numpy()))


def _complete(paths: list[Path]) -> bool:
    return all(path.is_file() for path in paths)


def _digest(first: str, rest: list[str]) -> str:
    return hashlib.sha256("\n".join([first, *rest]).encode()).hexdigest()
