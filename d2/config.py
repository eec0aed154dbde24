"""Configurations are frozen dataclasses that own defaults, types, units and ranges; YAML only overrides."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.resources
import json
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from d2 import fileio
from d2.errors import InputError, UsageError

Config = TypeVar("Config")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[Config]) -> type[Config]:
    """Decorator for a configuration class: immutable, unknown keys and silent type changes refused."""
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=rules)  # type: ignore[return-value]


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its default, its help text (units included) and its range (ge, gt, le, lt)."""
    return Field(default=default, description=help, **bounds)


def load(cls: type[Config], *sources: str | Path | dict[str, Any], sets: tuple[str, ...] = ()) -> Config:
    """Defaults of `cls`, then each source in order (preset name, YAML path or dict), then `key=value` texts.

    Raises InputError for an unknown key (with the nearest known one), a wrong type or a value out of
    range, and UsageError for a `sets` text without `=`.
    """
    values: dict[str, Any] = {}
    for source in sources:
        label = "config" if isinstance(source, dict) else str(source)
        layer = source if isinstance(source, dict) else fileio.read_yaml(preset_path(source))
        if not isinstance(layer, dict):
            raise InputError(f"{label}: expected a mapping of fields to values, got {type(layer).__name__}")
        values |= _known(cls, layer, label)
    values |= _known(cls, dict(_parse_set(text) for text in sets), "--set")
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{name}: {first['msg'].lower()}, got {_shown(first['input'])}") from error


def preset_path(name: str | Path, command: str = "") -> Path:
    """Where a preset lies: a path to a YAML file as it is, a bare name among those that ship.

    Presets of `d2 generate` are called generate-NAME.yaml; those without a command are of `d2 reconstruct`.
    """
    if isinstance(name, Path) or Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    folder = Path(str(importlib.resources.files("d2.configs")))
    prefix = f"{command}-" if command else ""
    known = sorted(p.stem.removeprefix(prefix) for p in folder.glob(f"{prefix}*.yaml") if command or "-" not in p.stem)
    path = folder / f"{prefix}{name}.yaml"
    if name not in known:
        raise InputError(f"no preset is called {name!r}; there are: {', '.join(known)}")
    return path


def resolved(value: Any) -> dict[str, Any]:
    """Every field of a configuration as plain data, fit for YAML."""
    return dataclasses.asdict(value)


def digest(value: Any) -> str:
    """A hash of every field: two configurations with the same digest give the same result."""
    return hashlib.sha256(json.dumps(resolved(value), sort_keys=True).encode()).hexdigest()[:16]


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Names the first field in which two resolved configurations differ, as `field: old -> new`."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
    return None


def _known(cls: type, layer: dict[str, Any], label: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    for key in layer:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
            raise InputError(f"{label}: unknown field {key!r}{hint}")
    return layer


def _shown(value: Any) -> str:
    """A value as it may stand in a message; Python refuses to write integers of more than 4300 digits."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text!r}: expected field=value")
    try:
        return key.strip(), fileio.parse_yaml(value, f"--set {key}")
    except InputError as error:
        raise InputError(f"--set {text!r}: {error}") from error
