"""Checkpoints of a reconstruction: the whole training state in one safetensors file; two are kept."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch

from d2 import fileio
from d2.errors import InputError
from d2.recon import densify
from d2.recon.corrections import Corrections
from d2.recon.gaussians import Gaussians4D
from d2.recon.train import State, state_of

KEEP = 2
FORMAT = "d2-reconstruct-state-1"
_NAME = re.compile(r"step_(\d{8})\.safetensors")


def save(folder: Path, state: State, extra: dict[str, int | str]) -> Path:
    """Writes step_<iteration>.safetensors, then removes all but the newest KEEP. `extra` comes back from load."""
    tensors, text = packed(state, extra)
    path = folder / f"step_{state.iteration:08d}.safetensors"
    fileio.write_tensors(path, tensors, {"format": FORMAT, "state": text, "sha256": _digest(tensors, text)})
    every = checkpoints(folder)
    up_to_here = [p for p in every if p.name <= path.name]  # later ones are what a damaged file left behind
    for old in set(every) - set(up_to_here[-KEEP:]):
        fileio.remove(old)
    return path


def packed(state: State, extra: dict[str, int | str]) -> tuple[dict[str, torch.Tensor], str]:
    """The state as named tensors, and everything else in it as JSON."""
    tensors = {f"gaussians.{name}": tensor for name, tensor in state.gaussians.tensors().items()}
    steps = _take_moments(state.adam, tensors)
    tensors |= {"stats.total": state.stats.total, "stats.seen": state.stats.seen}
    for kind, model in (("best", state.best), ("average", state.average)):
        if model is not None:
            tensors |= {f"{kind}.{name}": tensor for name, tensor in model.tensors().items()}
    if state.corrections is not None:
        tensors |= {f"corrections.{kind}": value for kind, value in state.corrections.values.items()}
        tensors |= {f"noise.{kind}": variance for kind, variance in state.corrections.noise.items()}
        tensors["centre"] = state.corrections.centre
    scalars = {
        "iteration": state.iteration,
        "half_side": state.half_side,
        "best_psnr": state.best_psnr,
        "adam_steps": steps,
        "extra": extra,
    }
    return tensors, json.dumps(scalars)


def checkpoints(folder: Path) -> list[Path]:
    """Existing checkpoints, oldest first, by the step in their name."""
    return sorted((p for p in folder.glob("step_*.safetensors") if _NAME.fullmatch(p.name)), key=lambda p: p.name)


def load(path: Path, device: torch.device | str) -> tuple[State, dict[str, int | str]]:
    """The state as it was saved, bit for bit. Raises InputError when the file is damaged."""
    tensors, metadata = fileio.read_tensors(path)
    try:
        if metadata["format"] != FORMAT:
            raise InputError(f"{fileio.quoted(path)} is not a checkpoint of this d2")
        if metadata["sha256"] != _digest(tensors, metadata["state"]):
            raise InputError(f"{fileio.quoted(path)} is a damaged checkpoint: its sha256 differs")
        return unpacked(tensors, metadata["state"], str(path), device)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{fileio.quoted(path)} is a damaged checkpoint: {error}") from error


def unpacked(
    tensors: dict[str, torch.Tensor], text: str, label: str, device: torch.device | str
) -> tuple[State, dict[str, int | str]]:
    """What `packed` took apart; raises InputError, KeyError, ValueError or TypeError for anything else."""
    scalars = json.loads(text)
    gaussians = Gaussians4D.checked(_under(tensors, "gaussians."), label).map(lambda x: x.to(device))
    state = state_of(gaussians, float(scalars["half_side"]))
    state.iteration, best_psnr = int(scalars["iteration"]), scalars["best_psnr"]
    state.best_psnr = None if best_psnr is None else float(best_psnr)
    _put_moments(state.adam, tensors, scalars["adam_steps"], device)
    state.stats = densify.GradientStats(len(gaussians), device)
    state.stats.total, state.stats.seen = (
        tensors["stats.total"].to(device),
        tensors["stats.seen"].to(device),
    )
    for kind in ("best", "average"):
        model = _under(tensors, f"{kind}.")
        if model:
            setattr(state, kind, Gaussians4D.checked(model, label).map(lambda x: x.to(device)))
    values, noise = (
        {kind: value.to(device) for kind, value in _under(tensors, prefix).items()}
        for prefix in ("corrections.", "noise.")
    )
    if values:
        state.corrections = Corrections(values, noise, tensors["centre"].to(device), state.half_side)
    return state, dict(scalars["extra"])


def _take_moments(adam: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Puts Adam's moments of every named group among the tensors; returns the steps that each has taken."""
    steps = {}
    for group in adam.param_groups:
        moments = adam.state.get(group["params"][0])
        if moments:
            tensors[f"adam.{group['name']}.exp_avg"] = moments["exp_avg"]
            tensors[f"adam.{group['name']}.exp_avg_sq"] = moments["exp_avg_sq"]
            steps[group["name"]] = float(moments["step"])
    return steps


def _put_moments(
    adam: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    steps: dict[str, float],
    device: torch.device | str,
) -> None:
    """The way back."""
    for group in adam.param_groups:
        name = group["name"]
        if name in steps:
            adam.state[group["params"][0]] = {
                "step": torch.tensor(steps[name], device=device),
                "exp_avg": tensors[f"adam.{name}.exp_avg"].to(device),
                "exp_avg_sq": tensors[f"adam.{name}.exp_avg_sq"].to(device),
            }


def _digest(tensors: dict[str, torch.Tensor], scalars: str) -> str:
    """sha256 of everything in a checkpoint: the file format itself would not notice a flipped bit."""
    digest = hashlib.sha256(scalars.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
