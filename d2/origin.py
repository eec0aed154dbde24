"""What a run is made from: everything that decides its result, so that a run goes on only as it was begun."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2 import __version__, fileio
from d2 import config as configuration
from d2.errors import InputError
from d2.inputs import Clip
from d2.pair import Pair
from d2.settings import GenerateConfig

CONFIG = "generate/config.yaml"
FREE_FOR_COMPARISON = ("d2", "torch", "input", "fps", "rank_timeout")  # recorded; others may go on with the run


@dataclass(frozen=True)
class Source:
    """The input of a run, decoded."""

    clip: Clip
    views: Clip | None  # given reference views, instead of sampled ones
    remove_background: bool
    placed: bool = False  # whether the pictures are those of the cameras already: an asset's


def identity(settings: GenerateConfig, source: Path, given: Source, pair: Pair) -> dict[str, Any]:
    """Everything that decides the result, as plain data."""
    record = configuration.resolved(settings) | {
        "input": source.resolve().name,
        "input_sha256": given.clip.digest,
        "views_sha256": given.views.digest if given.views else None,
        "remove_background": given.remove_background,
        "d2": __version__,
        "torch": str(torch.__version__),
    }
    record |= {f"{name}_sha256": digest for name, digest in pair.digests().items()}
    record |= {f"{model}_denoiser": denoiser.name for model, denoiser in pair.denoisers.items()}
    return json.loads(json.dumps(record))  # lists for tuples, as the file will give them back


def record(identity: dict[str, Any], settings: GenerateConfig, given: Source, pair: Pair) -> dict[str, Any]:
    """What the manifest says about the stage."""
    models = {
        spec.filename: {
            "sha256": identity[f"{spec.filename}_sha256"], "source": spec.repository, "licence": spec.licence
        }
        for spec in (pair.specs[model] for model in pair.paths)
    } | {own.name: {"source": f"given as {model}_denoiser"} for model, own in pair.denoisers.items()}  # fmt: skip
    return {
        "seed": settings.seed,
        "size": settings.size,
        "input": {"name": identity["input"], "sha256": given.clip.digest, "frames": list(given.clip.names)},
        "pick": settings.pick,
        "anchor_frame": settings.anchor_frame,
        "models": models,
        "config": digest(identity),
        "torch": identity["torch"],
    } | ({"cells": identity["cells"]} if "cells" in identity else {})


def difference(folder: Path, identity: dict[str, Any]) -> str | None:
    """The first field in which a run's stored configuration differs, if one is stored."""
    path = folder / CONFIG
    if not path.exists():
        return None
    old = fileio.read_yaml(path)
    if not isinstance(old, dict):
        raise InputError(f"{fileio.quoted(path)} is not a configuration; pass --overwrite to start anew")
    return configuration.first_difference(_compared(old), _compared(identity))


def _compared(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in FREE_FOR_COMPARISON}


def digest(identity: dict[str, Any]) -> str:
    """A hash of what decides the result."""
    return hashlib.sha256(json.dumps(_compared(identity), sort_keys=True).encode()).hexdigest()
