"""Strict loading of the official checkpoints: every tensor of the file is known, every parameter is filled.

The truth about names and shapes is the state dict of our own modules, built on the meta device.  A file is
checked by its header alone, in well under a second; then tensors are read one by one.  SVD may also be a folder as
diffusers keeps it, unet/, vae/ and image_encoder/, in safetensors files, whole or sharded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2.errors import InputError, SetupError
from d2.fileio import MB, inside, quoted, read_json, sha256
from d2.models import diffusers
from d2.models.clip import ViTConfig
from d2.models.conditioner import SV3D_SLOTS, SVD_SLOTS, Conditioner
from d2.models.patch import PatchConfig, PatchFirstStage
from d2.models.unet import SV3D_P, SVD_XT, UNetConfig, VideoUNet
from d2.models.vae import FirstStage, KLAutoencoder, VAEConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEADER_CAP = 8 * MB  # the official headers have 0.3 MB
MAX_AXES = 8
Part = Literal["unet", "conditioner", "first_stage"]
PREFIX: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "conditioner": "conditioner.",
    "first_stage": "first_stage_model.",
}


@dataclass(frozen=True)
class ModelSpec:
    """One checkpoint: what it holds, and where its owner gives it away."""

    name: str
    unet: UNetConfig
    slots: tuple[str, ...]  # of the conditioner
    video_decoder: bool
    repository: str  # on Hugging Face; empty where nobody publishes it
    clip: ViTConfig = field(default_factory=ViTConfig)
    clip_text: tuple[int, int, int] = (1024, 77, 49408)  # width, positions, vocabulary of CLIP's other half
    vae: VAEConfig | PatchConfig = field(default_factory=VAEConfig)
    licence: str = "Stability AI Community License"

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"


SVD = ModelSpec("svd_xt", SVD_XT, SVD_SLOTS, True, "stabilityai/stable-video-diffusion-img2vid-xt")
SV3D = ModelSpec("sv3d_p", SV3D_P, SV3D_SLOTS, False, "stabilityai/sv3d")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def place(self) -> tuple[Path, int]:
        """By which tensors are read in the order of the disk."""
        return self.path, self.start


class Stored(NamedTuple):
    """One tensor of the official layout: where its pieces lie, and what it is of them."""

    entries: tuple[Entry, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


def find(spec: ModelSpec, folder: str | Path | None = None) -> Path:
    """The path of a checkpoint in `folder`, $D2_WEIGHTS or checkpoints/, or of one that comes with d2.

    Where the file is not there, it is looked for as a folder of diffusers: called as the file or as its repository, or
    the folder itself.  Raises SetupError without it, and for one that is not in the `folder` asked for.
    """
    home = Path(folder or os.environ.get("D2_WEIGHTS") or "checkpoints")
    path = home / spec.filename
    if path.exists():
        return path
    for place in (home / spec.name, home / spec.repository.rpartition("/")[2], home):
        if _is_diffusers(place, spec):
            return place
    shipped = Path(str(importlib.resources.files("d2.configs"))) / spec.filename
    if folder is None and not spec.repository and shipped.exists():
        return shipped
    if not spec.repository:
        raise SetupError(f"{quoted(path)} does not exist; say where {spec.filename} lies with --weights DIR")
    raise SetupError(
        f"{quoted(path)} does not exist (or say where it is with --weights DIR or $D2_WEIGHTS); accept the licence "
        f"'{spec.licence}' of {spec.repository} on Hugging Face, then run: "
        f"hf download {spec.repository} {spec.filename} --local-dir {quoted(path.parent)}"
    )


def load(
    path: str | Path,
    spec: ModelSpec,
    part: Part,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """One network of a checkpoint, ready to run.

    Host memory: this part in `dtype` (none of it on another device) and the largest tensor of the file.
    Raises SetupError, naming the tensor, when the file is not exactly `spec` or a value is not finite.
    """
    stored = {name.removeprefix(PREFIX[part]): where for name, where in check(path, spec).items()}
    with torch.device("meta"):
        module = build(spec, part)
    tensors = {}
    for name in sorted(module.state_dict(), key=lambda name: stored[name].entries[0].place):
        tensor = stored[name].make(*map(_read, stored[name].entries)).to(device, dtype)
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # a NaN anywhere is both bounds
            raise SetupError(f"{quoted(path)}: {PREFIX[part]}{name} holds NaN or infinity (read as {dtype})")
        tensors[name] = tensor
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check(path: str | Path, spec: ModelSpec) -> dict[str, Stored]:
    """Where the tensors of a checkpoint lie whose names, shapes and dtypes are exactly those of `spec`; reads headers.

    Leftovers (parts of the original networks that nothing here uses) may be absent together, not one by one.
    Raises SetupError with the first three differences and their number.
    """
    path = Path(path)
    if _is_diffusers(path, spec):
        return _check_folder(path, spec)
    header = read_header(path)
    found = {name: entry.shape for name, entry in header.items()}
    problems = _differences(found, _wanted(found, spec))
    if problems:
        swapped = [s.name for s in (SVD, SV3D) if s != spec and not _differences(found, _wanted(found, s))]
        what = f"is {swapped[0]}, not {spec.name}" if swapped else f"is not {spec.name}"
        raise SetupError(f"{quoted(path)} {what}: {'; '.join(problems)}")
    return {name: Stored((entry,)) for name, entry in header.items()}


def digest(path: Path) -> str:
    """sha256 of a checkpoint; of a folder that of its files' names and digests."""
    if not path.is_dir():
        return sha256(path)
    lines = [f"{part}/{file.name} {sha256(file)}\n" for part in diffusers.STEMS for file in _files(path, part)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_diffusers(folder: Path, spec: ModelSpec) -> bool:
    """Whether it has the folders of a diffusers pipeline, of a model that diffusers has."""
    svd = spec.video_decoder and isinstance(spec.vae, VAEConfig)
    return svd and all((folder / part).is_dir() for part in diffusers.STEMS)


def _check_folder(folder: Path, spec: ModelSpec) -> dict[str, Stored]:
    """What `check` does, for a folder of diffusers."""
    assert isinstance(spec.vae, VAEConfig)
    found: dict[str, Entry] = {}
    for part in diffusers.STEMS:
        for file in _files(folder, part):
            header = {f"{part}/{name}": entry for name, entry in read_header(file).items()}
            if twice := found.keys() & header.keys():
                raise SetupError(f"{quoted(folder)}: {quoted(min(twice)[:200])} lies in more than one file")
            found |= header
    origins = diffusers.origins(layout(spec), spec.unet.num_res_blocks, len(spec.vae.ch_mult))
    wanted = {name: shape for o in origins.values() for name, shape in zip(o.names, o.shapes, strict=True)}
    problems = _differences({name: entry.shape for name, entry in found.items()}, wanted)
    if problems:
        raise SetupError(f"{quoted(folder)} is not {spec.name} as diffusers keeps it: {'; '.join(problems)}")
    return {name: Stored(tuple(found[part] for part in o.names), o.make) for name, o in origins.items()}


def _files(folder: Path, part: str) -> list[Path]:
    """The safetensors of one network of diffusers: one file or those its index names, in full precision if there."""
    home, stem = folder / part, diffusers.STEMS[part]
    for variant in ("", ".fp16"):
        if (home / f"{stem}{variant}.safetensors").exists():
            return [home / f"{stem}{variant}.safetensors"]
        index = home / f"{stem}.safetensors.index{variant}.json"
        if index.exists():
            try:
                return [inside(home, name) for name in sorted(set(read_json(index, HEADER_CAP)["weight_map"].values()))]
            except (InputError, TypeError, KeyError, AttributeError) as error:
                raise SetupError(f"{quoted(index)} is not an index of safetensors files: {error}") from error
    raise SetupError(f"{quoted(home)} holds no {stem}.safetensors, nor {stem}.fp16.safetensors, nor an index of them")


def build(spec: ModelSpec, part: Part) -> nn.Module:
    """One network of a checkpoint, its parameters unset, on the current default device."""
    if part == "unet":
        return VideoUNet(spec.unet)
    if part == "conditioner":
        return Conditioner(spec.slots, spec.clip, spec.vae)
    if isinstance(spec.vae, PatchConfig):
        return PatchFirstStage(spec.vae)
    return FirstStage(spec.vae, spec.video_decoder)


@functools.cache
def layout(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that is loaded."""
    with torch.device("meta"):
        parts = {prefix: build(spec, part) for part, prefix in PREFIX.items()}
    return {prefix + k: tuple(v.shape) for prefix, m in parts.items() for k, v in m.state_dict().items()}


@functools.cache
def leftovers(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what else the files hold: CLIP's text half, the decoder of the conditioner's VAE."""
    if isinstance(spec.vae, PatchConfig):
        return {}
    clip = f"conditioner.embedders.{spec.slots.index('image')}.open_clip.model."
    vae = f"conditioner.embedders.{spec.slots.index('latent')}.encoder."
    width, positions, vocabulary = spec.clip_text
    text = {
        "positional_embedding": (positions, width),
        "text_projection": (width, spec.clip.output_dim),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    with torch.device("meta"):
        whole, used = (KLAutoencoder(spec.vae, decoder).state_dict() for decoder in (True, False))
    decoder = {vae + name: tuple(t.shape) for name, t in whole.items() if name not in used}
    return {clip + name: shape for name, shape in text.items()} | decoder


def _wanted(found: dict[str, tuple[int, ...]], spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What a file has to hold that holds `found`."""
    return layout(spec) | leftovers(spec) if any(name in found for name in leftovers(spec)) else layout(spec)


def _differences(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    missing = [name for name in wanted if name not in found]
    unknown = [quoted(name[:200]) for name in found if name not in wanted]
    reshaped = [
        f"{name} (expected {list(wanted[name])}, got {list(found[name])})"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    kinds = {"missing": missing, "not part of it": unknown, "of another shape": reshaped}
    return [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind}: {', '.join(names[:3])}"
        + (", ..." if len(names) > 3 else "")
        for kind, names in kinds.items()
        if names
    ]


def read_header(path: str | Path) -> dict[str, Entry]:
    """Name -> entry of a safetensors file whose tensors fill it without gap or overlap.

    Raises SetupError for anything else, and says what the file seems to be instead.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise SetupError(f"{quoted(path)} is not a file; expected a safetensors checkpoint")
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, HEADER_CAP):
                raise SetupError(f"{quoted(path)} {_guess(start)}; expected a safetensors checkpoint")
            text = file.read(length)
    except OSError as error:
        raise SetupError(f"cannot read {quoted(path)}: {(error.strerror or str(error)).lower()}") from error
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
        raw.pop("__metadata__", None)
        header = {name: _entry(path, name, value, 8 + length) for name, value in raw.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise SetupError(f"{quoted(path)} is not a valid safetensors file: {reason}") from error
    _check_spans(header, 8 + length, size, path)
    return header


def _entry(path: Path, name: str, value: dict, offset: int) -> Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{quoted(name[:200])} has dtype {str(value['dtype'])[:20]}; expected {', '.join(DTYPES)}")
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    if len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"{quoted(name[:200])}: its shape or its place in the file makes no sense")
    dtype = DTYPES[value["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{quoted(name[:200])} of shape {list(shape)} spans {end - start} bytes")
    return Entry(path, dtype, shape, offset + start, offset + end)


def _check_spans(header: dict[str, Entry], begin: int, size: int, path: Path) -> None:
    for entry in sorted(header.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != begin:
            raise SetupError(f"{quoted(path)} is not a valid safetensors file: tensors overlap or leave gaps")
        begin = entry.end
    if begin != size:
        state = "truncated" if size < begin else "followed by something else"
        raise SetupError(f"{quoted(path)} is {state}: {begin} bytes expected, {size} found")


def _guess(start: bytes) -> str:
    """What a file that is no safetensors file seems to be, by its first bytes."""
    if not start:
        return "is empty"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the file it stands for (git lfs pull fetches that)"
    if start.startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return "is a pickled PyTorch file, which is never opened because it can run code"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is an HTML page, perhaps a login or error page saved instead of the download"
    return "is not a safetensors file, or is truncated"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return dict(pairs)


def _read(entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise SetupError(f"{quoted(entry.path)} ended while it was read")
                done += count
    except OSError as error:
        raise SetupError(f"cannot read {quoted(entry.path)}: {(error.strerror or str(error)).lower()}") from error
    return tensor
