"""What `d2 batch` is asked to do: paths, patterns and manifests become one job for each asset."""

from __future__ import annotations

import csv
import glob
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d2 import fileio
from d2.asset import MESH_SUFFIXES
from d2.errors import InputError
from d2.recon.dataset import find_transforms
from d2.recon.pipeline import plain_name
from d2.run import is_run

MANIFEST_CAP = 16 * fileio.MB
MOST = 100_000  # assets
MANIFESTS = (".csv", ".jsonl")
COLUMNS = (
    "input", "name", "preset", "reconstruct_preset", "seed", "elevation_deg", "image_frame_ratio", "motion", "fps",
    "views", "mask",
)  # fmt: skip
PATHS = ("input", "views", "mask")  # relative to the manifest's folder
OF_A_DATASET = ("input", "name", "reconstruct_preset", "fps")  # what is left to say where pictures are there already

Kind = Literal["picture", "solid", "dataset"]


@dataclass(frozen=True)
class Job:
    """One asset of a batch."""

    name: str  # of its run folder
    source: Path  # absolute
    kind: Kind  # what stage 1 draws from, what is drawn from every side, what stage 2 takes as it is
    options: tuple[tuple[str, str], ...] = ()  # of `d2 run`, without the dashes


def read_jobs(inputs: Sequence[str]) -> list[Job]:
    """One job for each asset that `inputs` name: files and folders, patterns (`shots/*.png`), CSV and JSONL manifests.

    A manifest has a line for each asset: `input`, and where wanted `name` and options of `d2 run` (COLUMNS).  Raises
    InputError for what is not there, for unknown columns and for two assets of one name, before anything is begun.
    """
    jobs = [job for text in inputs for job in _jobs_of(text)]
    if not 1 <= len(jobs) <= MOST:
        raise InputError(f"a batch takes 1 to {MOST} assets, got {len(jobs)}")
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.name.casefold(), job)
        if other is not job:
            paths = f"{fileio.quoted(other.source)} and {fileio.quoted(job.source)}"
            raise InputError(f"{paths} are both called {job.name!r}; give them names in a manifest (input,name)")
    return jobs


def _jobs_of(text: str) -> Iterable[Job]:
    path = Path(text)
    if path.suffix.lower() in MANIFESTS and path.is_file():
        return _manifest(path)
    if not path.exists() and glob.has_magic(text):
        found = sorted(glob.glob(text, recursive=True))
        if not found:
            raise InputError(f"{fileio.quoted(text)} matches nothing")
        return [_job({"input": name}, Path(), fileio.quoted(text)) for name in found]
    return [_job({"input": text}, Path(), "")]


def _manifest(path: Path) -> list[Job]:
    data, label = fileio.read_bytes(path, MANIFEST_CAP), fileio.quoted(path)
    rows = _csv_rows(data, label) if path.suffix.lower() == ".csv" else _json_rows(data, label)
    if not rows:
        raise InputError(f"{label} names no asset")
    return [_job(row, path.parent, f"{label}, line {line}") for line, row in rows]


def _csv_rows(data: bytes, label: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, {k: v for k, v in row.items() if v not in (None, "")}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{label} is not a CSV file in UTF-8: {error}") from error
    for line, row in rows:
        if None in row:  # where DictReader puts what has no column
            raise InputError(f"{label}, line {line}: more values than columns")
    return [(line, row) for line, row in rows if row]


def _json_rows(data: bytes, label: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            row = fileio.parse_json(line, f"{label}, line {number}")
            if not isinstance(row, dict):
                raise InputError(f'{label}, line {number}: expected an object such as {{"input": "cat.png"}}')
            rows.append((number, row))
    return rows


def _job(row: dict[str, Any], folder: Path, where: str) -> Job:
    prefix = f"{where}: " if where else ""
    for key, value in row.items():
        if key not in COLUMNS:
            raise InputError(f"{prefix}unknown column {key!r}; known: {', '.join(COLUMNS)}")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise InputError(f"{prefix}{key} must be text or a number, got {str(value)[:80]!r}")
    if "input" not in row:
        raise InputError(f"{prefix}no input is given")
    values = {key: str(folder / str(value)) if key in PATHS else str(value) for key, value in row.items()}
    source = Path(values.pop("input"))
    kind = _kind(source)
    given = values.pop("name", None)
    name = plain_name(given) if given is not None else _name_of(source)
    if kind == "dataset":
        extra = [key for key in values if key not in OF_A_DATASET]
        if extra:
            raise InputError(f"{prefix}{extra[0]} is of stage 1, and {fileio.quoted(source)} has its pictures already")
    options = tuple((key.replace("_", "-"), value) for key, value in values.items())
    return Job(name, source.resolve(), kind, options)


def _kind(source: Path) -> Kind:
    """Raises InputError for a path that is not there."""
    try:
        exists, is_folder = source.exists(), source.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {fileio.quoted(source)}: {(error.strerror or str(error)).lower()}") from error
    if not exists:
        raise InputError(f"{fileio.quoted(source)} does not exist")
    if is_folder and (is_run(source) or _holds_transforms(source)):
        return "dataset"
    if not is_folder and source.suffix.lower() == ".json":
        return "dataset"
    return "solid" if source.suffix.lower() in MESH_SUFFIXES else "picture"


def _holds_transforms(folder: Path) -> bool:
    try:
        return bool(find_transforms(folder))
    except InputError:
        return False


def _name_of(source: Path) -> str:
    """What a run of this input is called: the file's name, of a transforms.json the folder's."""
    path = source.resolve()
    name = path.parent.name if path.suffix.lower() == ".json" else path.name if path.is_dir() else path.stem
    return plain_name(re.sub(r'[\0-\x1f/\\:*?"<>|]', "_", name).lstrip(".") or "asset")
