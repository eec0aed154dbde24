"""Reconstructions of d2 to and from checkpoint folders of nerfstudio's method d2-4dgs, without nerfstudio."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import torch

from d2 import fileio
from d2.errors import ConflictError, InputError
from d2.recon import checkpoint, drawing, train
from d2.recon.gaussians import Gaussians4D
from d2.recon.sources import DEFAULT_FPS, GAUSSIANS, STAGE_PREFIX
from d2.run import Run, is_run

METHOD = "d2-4dgs"
TIMESTAMP = "d2"  # in place of the time that nerfstudio calls a folder after
CHECKPOINTS = "nerfstudio_models"  # nerfstudio's name for the folder of checkpoints
_STEP = re.compile(r"step-(\d{9})\.safetensors")


def model_file(folder: Path, step: int | str) -> Path:
    """Where the method writes the 4D Gaussians of a step: beside the .ckpt, which is a pickle that d2 never opens."""
    return folder / f"step-{step:09d}.safetensors" if isinstance(step, int) else folder / f"step-{step}.safetensors"


def import_checkpoint(path: str | Path, out: str | Path, name: str = "main") -> Path:
    """Takes the newest model of a d2-4dgs checkpoint folder into the run folder `out`, made where it is none.

    `path` is what ns-train wrote (…/d2-4dgs/<time>), its nerfstudio_models, or one step-*.safetensors.  Returns the
    folder of the reconstruction, <out>/recon/<name>.  Raises InputError for anything else and ConflictError where that
    reconstruction exists.
    """
    file = _newest(Path(path))
    gaussians, metadata = Gaussians4D.load_with_metadata(file)
    out, stage = Path(out), STAGE_PREFIX + name
    folder = out / "recon" / name
    if os.path.lexists(folder):
        raise ConflictError(f"{fileio.quoted(folder)} exists; choose another --name or --out")
    run = Run.open(out) if is_run(out) else Run.create(out, float(metadata.get("fps", DEFAULT_FPS)))
    with run.lock():
        gaussians.save(folder / GAUSSIANS, metadata)
        record = {"psnr": None, "iterations": 0, "gaussians": len(gaussians), "imported": {"kind": METHOD}}
        run.commit_stage(stage, record | {"files": {GAUSSIANS: fileio.sha256(folder / GAUSSIANS)}})
    return folder


def is_checkpoint(path: str | Path) -> bool:
    """Whether `import_checkpoint` finds a model there."""
    try:
        return _newest(Path(path)).is_file()
    except InputError:
        return False


def _newest(path: Path) -> Path:
    """The model to read; raises InputError where a folder holds none."""
    if path.is_file():
        if not _STEP.fullmatch(path.name):
            raise InputError(f"{fileio.quoted(path)} is no step-*.safetensors that {METHOD} wrote beside its .ckpt")
        return path
    places = (path, path / CHECKPOINTS)
    found = [file for place in places for file in place.glob("step-*") if _STEP.fullmatch(file.name)]
    if not found:
        raise InputError(
            f"{fileio.quoted(path)} holds no step-*.safetensors, which ns-train {METHOD} writes beside its checkpoints;"
            f" name the folder that holds config.yml, or {CHECKPOINTS} in it"
        )
    return max(found, key=lambda file: file.name)


def write_checkpoint(gaussians: Gaussians4D, metadata: dict[str, str], folder: Path, final: Path, data: Path) -> None:
    """Writes a trained d2-4dgs into `folder` as nerfstudio keeps it: config.yml and a checkpoint.

    `final` is where the folder is going to stand and `data` the dataset; config.yml names both by absolute paths, as
    nerfstudio's own do.
    """
    home = folder / METHOD / TIMESTAMP
    arguments = json.dumps([str(final.absolute()), str(data.absolute())])
    config = f"!!python/object/apply:d2.recon.nerf.method.of_export {arguments}\n"
    fileio.atomic_write(home / "config.yml", config.encode())
    fileio.atomic_write(home / CHECKPOINTS / f"step-{0:09d}.ckpt", _ckpt(gaussians))
    gaussians.save(model_file(home / CHECKPOINTS, 0), metadata)


def _ckpt(gaussians: Gaussians4D) -> bytes:
    """What nerfstudio loads: plain tensors and text, so that torch reads it with weights_only."""
    state = train.state_of(gaussians, drawing.framing(gaussians).radius)
    tensors, text = checkpoint.packed(state, {})
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    pipeline = {
        "_model.background": torch.ones(3),
        "_model.device_indicator_param": torch.empty(0),
        "_model._extra_state": {"tensors": tensors, "state": text},
    }
    buffer = io.BytesIO()
    torch.save({"step": 0, "pipeline": pipeline, "optimizers": {}, "schedulers": {}, "scalers": {}}, buffer)
    return buffer.getvalue()
