"""The only place that writes files: whole or not at all, and readers that check before they allocate."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2.errors import InputError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

MB = 1 << 20
JSON_CAP = 1 * MB  # bytes, for manifests; transforms.json passes its own
YAML_CAP = MB // 16  # the parser reads 80 kB a second
TRANSFORMS_CAP = 32 * MB
SAFETENSORS_CAP = 16 << 30
METADATA_KEY = "d2"  # of a safetensors file, holding one JSON object of texts
MAX_NESTING = 32  # levels of lists and objects in a JSON or YAML file


# -- writing ---------------------------------------------------------------------------------------------


def before_change(change: str, path: Path) -> None:
    """Every change on disk passes here first: what is about to happen, to which path.  It does nothing; those who test
    put something in its place that fails, or ends the process, at the n-th."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is fsynced and renamed to `path`.

    For encoders that insist on opening a file by name.  The suffix is kept, so that they recognise the
    format.  On any exception the temporary file is removed and `path` stays as it was.
    Raises ResourceError when the disk refuses.
    """
    path = Path(path)
    temporary = None
    try:
        with _changing("create", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}.", suffix=path.suffix, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
        with _changing("write", path):
            yield temporary
        with _changing("fsync", path), open(temporary, "rb") as file:
            os.fsync(file.fileno())
        with _changing("replace", path):
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
        with _changing("fsync folder", path):
            _fsync_folder(path.parent)
    finally:
        if temporary is not None:
            _remove_temporary(temporary)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes `data` as the whole content of `path`, or leaves the old file untouched."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON, keys in the order given; NaN and infinity are refused (ValueError: our bug)."""
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def write_yaml(path: str | Path, value: Any) -> None:
    """Block-style YAML of plain lists, dicts and scalars."""
    import io

    buffer = io.StringIO()
    _yaml().dump(value, buffer)
    atomic_write(path, buffer.getvalue().encode())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file; tensors are made contiguous on the CPU.

    Metadata goes under one key: safetensors writes several in random order, and equal content must give equal bytes.
    """
    from safetensors.torch import save

    packed = {METADATA_KEY: json.dumps(metadata or {}, sort_keys=True)}
    atomic_write(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, packed))


def append_line(path: str | Path, line: str) -> None:
    """Appends one line of text and flushes it; a reader may see a torn last line after a crash."""
    with _changing("append", Path(path)), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def truncate(path: str | Path, size: int) -> None:
    """Cuts a log back to `size` bytes (used when a run resumes from an older checkpoint)."""
    with _changing("truncate", Path(path)), contextlib.suppress(FileNotFoundError):
        os.truncate(path, size)


def create_exclusive(path: str | Path, data: bytes) -> bool:
    """Creates `path` with its whole content if nothing has that name; False when something has."""
    path = Path(path)
    temporary = None
    try:
        with _changing("create", path):
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
        with _changing("link", path):
            try:
                os.link(temporary, path)  # atomic, and fails when the name is taken
            except FileExistsError:
                return False
        return True
    finally:
        if temporary is not None:
            _remove_temporary(Path(temporary))


def remove(path: str | Path) -> None:
    """Removes a file or a whole folder; absent is fine."""
    path = Path(path)
    with _changing("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def swap_folder(new: str | Path, final: str | Path) -> None:
    """Puts the finished folder `new` in the place of `final`; the old one goes afterwards, or is back on failure."""
    new, final = Path(new), _itself(final)
    old = sibling(final, ".old")
    remove(old)
    try:
        if final.exists():
            with _changing("replace", final):
                os.replace(final, old)
        with _changing("replace", new):
            os.replace(new, final)
    except ResourceError:
        undo_swap(final)
        raise
    with _changing("fsync folder", final):
        _fsync_folder(final.parent)
    remove(old)


def undo_swap(final: str | Path) -> None:
    """Brings the old folder back where a swap_folder died between its two renames."""
    final = _itself(final)
    old = sibling(final, ".old")
    if os.path.isdir(old) and not os.path.exists(final):  # pathlib's raise where they may not look
        with _changing("replace", final):
            os.replace(old, final)


def sibling(folder: str | Path, ending: str) -> Path:
    """The hidden folder .<name><ending> beside one, for what will take its place or stood there before.

    Links, "." and ".." are followed, so that both lie on one file system and the folder itself is replaced.
    """
    itself = _itself(folder)
    return itself.parent / f".{itself.name}{ending}"


def _itself(folder: str | Path) -> Path:
    """A path that ends in the folder's own name."""
    path = Path(folder)
    return _resolved(path) if path.name in ("", "..") or os.path.islink(path) else path


def _remove_temporary(path: Path) -> None:
    """Quietly: where the disk refuses even that, a leftover stays."""
    with contextlib.suppress(OSError):
        before_change("remove", path)
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _changing(change: str, path: Path) -> Iterator[None]:
    """One change on disk; raises ResourceError when the disk refuses."""
    try:
        before_change(change, path)
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot {'remove' if change == 'remove' else 'write'} {path}: {error.strerror or error}; free the disk or"
            " choose another --out"
        ) from error


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- reading ---------------------------------------------------------------------------------------------


def read_bytes(path: str | Path, cap: int) -> bytes:
    """The whole file, at most `cap` bytes of it long; raises InputError naming the file otherwise."""
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{quoted(path)} does not exist")
        if not path.is_file():
            raise InputError(f"{quoted(path)} is not a regular file")
        size = path.stat().st_size
        if size > cap:
            raise InputError(f"{quoted(path)} has {size} bytes, more than the {cap} allowed for this kind of file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {quoted(path)}: {(error.strerror or str(error)).lower()}") from error


def read_json(path: str | Path, cap: int = JSON_CAP) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no duplicate keys, bounded nesting. Raises InputError."""
    return parse_json(read_bytes(path, cap), quoted(path))


def parse_json(data: bytes, label: str) -> Any:
    """The value of a JSON text, under the rules of read_json; `label` names it in the message."""
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label} is not valid JSON: {str(error) or 'nested too deeply'}") from error
    _check_nesting(value, label)
    return value


def read_yaml(path: str | Path, cap: int = YAML_CAP) -> Any:
    """YAML 1.2, safe types only, no duplicate keys, no aliases, `1e-5` is a number. Raises InputError."""
    data = read_bytes(path, cap)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{quoted(path)} is not valid YAML: {error}") from error
    return parse_yaml(text, quoted(path))


def parse_yaml(text: str, label: str) -> Any:
    """The value of a YAML text, under the rules of read_yaml; `label` names it in the message."""
    from ruamel.yaml.error import YAMLError

    try:
        value = _yaml().load(text)
    except (YAMLError, ValueError, RecursionError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"{label} is not valid YAML: {str(error)[:300]}") from error
    _check_nesting(value, label)
    return value


def read_tensors(path: str | Path, cap: int = SAFETENSORS_CAP) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, and the metadata that `write_tensors` put there, its header checked first. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    _check_safetensors_header(Path(path), cap)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            return tensors, {str(k): str(v) for k, v in metadata.items()}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{quoted(path)} is not a valid safetensors file: {str(error)[:300]}") from error


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {quoted(path)}: {(error.strerror or str(error)).lower()}") from error


def inside(folder: str | Path, relative: str) -> Path:
    """The path `relative` names within `folder`; raises InputError when it would leave it."""
    folder = Path(folder)
    if not isinstance(relative, str) or "\0" in relative or Path(relative).is_absolute() or "\\" in relative:
        raise InputError(f"path {relative!r} must be relative and in POSIX form")
    target = Path(os.path.normpath(folder / relative))
    base = Path(os.path.normpath(folder))
    if not target.is_relative_to(base) or not _resolved(target).is_relative_to(_resolved(base)):
        raise InputError(f"path {relative!r} leaves the folder {quoted(folder)}")
    return target


def quoted(path: str | Path) -> str:
    """A path as it may stand in a message: quoted when it holds spaces or control characters."""
    text = str(path)
    return text if text.isprintable() and " " not in text and text else repr(text)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: text that no file name can hold
        raise InputError(f"cannot follow {quoted(path)}: {error}") from error


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[attr-defined]
    return yaml


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object holds the same key twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_nesting(value: Any, label: str) -> None:
    """Bounds the depth, and refuses containers that occur twice: YAML aliases write 10^9 values in ten lines."""
    seen: set[int] = set()
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [v for v in level if isinstance(v, dict | list)]
        ids = {id(v) for v in containers}
        if len(ids) < len(containers) or ids & seen:
            raise InputError(f"{label} uses YAML aliases; write the values out")
        seen |= ids
        level = [c for v in containers for c in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise InputError(f"{label} is nested deeper than {MAX_NESTING} levels")


def _check_safetensors_header(path: Path, cap: int) -> None:
    """The first eight bytes hold the header's length: refuse nonsense before anything is mapped."""
    try:
        if not path.is_file():
            raise InputError(f"{quoted(path)} does not exist")
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"cannot read {quoted(path)}: {(error.strerror or str(error)).lower()}") from error
    if size > cap:
        raise InputError(f"{quoted(path)} has {size} bytes, more than the {cap} allowed")
    if len(head) < 8 or struct.unpack("<Q", head)[0] > min(size - 8, 100 * MB):
        raise InputError(f"{quoted(path)} is not a safetensors file, or is truncated")
