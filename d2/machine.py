"""What this machine is and has: for `d2 doctor`, for benchmark records, and for one clear line when something lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from d2 import __version__
from d2.errors import InputError, SetupError

if TYPE_CHECKING:
    import torch

# Shared libraries that a package needs from the system, and Debian's package for each.
SYSTEM_LIBRARIES = {
    "libusb-1.0.so.0": "libusb-1.0-0",
    "libGL.so.1": "libgl1",
    "libgomp.so.1": "libgomp1",
    "libX11.so.6": "libx11-6",
    "libEGL.so.1": "libegl1",
}
EXTRAS = {
    "open3d": "mesh", "pxr": "usd", "fourdgs": "fourdgs", "OpenEXR": "exr", "nerfstudio": "nerfstudio", "ray": "ray",
}  # fmt: skip


class Check(NamedTuple):
    """One line of `d2 doctor`."""

    name: str
    ok: bool
    optional: bool
    detail: str


def require(module: str, distribution: str | None = None) -> ModuleType:
    """Imports an optional module; SetupError says in one line how to get it or the system library it lacks."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise SetupError(f"{module} needs {error.name}; run: pip install {error.name}") from error
        raise SetupError(
            f"{module} is not installed; run: pip install {_install_name(module, distribution)}"
        ) from error
    except (ImportError, OSError) as error:
        raise SetupError(_library_hint(module, str(error))) from error


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where torch sees a GPU.

    Raises InputError for what is no device, SetupError for one that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise SetupError(f"--device {name}: torch {torch.__version__} sees no such GPU; use --device cpu")
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N")
    return device


def describe() -> dict[str, Any]:
    """What benchmark results record about the machine."""
    import torch

    record: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "d2": __version__,
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
    return record


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checks() -> list[Check]:
    """Every check, in the order of the pipeline; none raises."""
    results = [
        Check(
            "d2",
            True,
            False,
            f"{__version__} on Python {platform.python_version()}, {_cpu_name()}, {available_cores()} cores",
        )
    ]
    results += [_package(name, optional=False) for name in ("torch", "numba", "safetensors", "pillow", "plyfile")]
    results += [_cuda(), _rasterizer(), _video(), _package("rembg", optional=True)]
    results += [_extra(module) for module in EXTRAS]
    return results


def dependencies() -> dict[str, dict[str, str | None]]:
    """Version and licence of every distribution that d2 names, as installed; of an extra that is not, None."""
    found = {}
    try:
        named = importlib.metadata.requires("d2-4d") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        named = []
    for text in named:
        name = re.split(r"[^\w.-]", text, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)", text)
        if name == "d2-4d" or (extra and extra[1] == "dev"):
            continue
        try:
            about = importlib.metadata.metadata(name)
            found[name] = {"version": about["Version"], "licence": _licence(about)}
        except importlib.metadata.PackageNotFoundError:
            found[name] = {"version": None, "licence": None}
        found[name]["extra"] = extra and extra[1]
    return found


def _licence(about: importlib.metadata.PackageMetadata) -> str:
    """What a distribution says about its licence: the SPDX expression, the classifier, or the first line of a text."""
    classifiers = [text for text in about.get_all("Classifier") or [] if text.startswith("License ::")]
    told = [about["License-Expression"], *(text.split(" :: ")[-1] for text in classifiers), about["License"]]
    return next((text.strip().splitlines()[0] for text in told if text and text.strip()), "not told")


def _package(name: str, optional: bool) -> Check:
    try:
        return Check(name, True, optional, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, optional, f"not installed; run: pip install {name}")


def _cuda() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("cuda", False, False, _library_hint("torch", str(error)))
    if torch.cuda.is_available():
        return Check("cuda", True, True, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    reason = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
    return Check("cuda", False, True, f"{reason}; everything runs on the CPU")


def _rasterizer() -> Check:
    """The backend d2 would choose; gsplat is looked at, never imported: without CUDA its import starts a build."""
    gsplat = _package("gsplat", optional=True)
    try:
        import torch
    except (ImportError, OSError):
        return Check("rasterizer", False, False, "needs torch")
    if torch.cuda.is_available():
        return Check("rasterizer", gsplat.ok, False, f"gsplat {gsplat.detail} on CUDA (kernels build on first use)")
    return Check("rasterizer", True, False, f"numba kernels on the CPU (gsplat {gsplat.detail} is for CUDA)")


def _video() -> Check:
    try:
        import imageio_ffmpeg

        return Check("video", True, True, f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}")
    except (ImportError, RuntimeError) as error:
        return Check("video", False, True, f"no MP4 export: {error}; run: pip install 'imageio[ffmpeg]'")


def _extra(module: str) -> Check:
    """Extras are found, not imported (some take a minute); a missing system library shows when they are used."""
    if importlib.util.find_spec(module) is None:
        return Check(module, False, True, f"optional; run: pip install {_install_name(module, None)}")
    missing = _missing_libraries() if module == "open3d" else []
    if missing:
        return Check(module, False, True, f"needs {', '.join(missing)}; run: apt-get install {' '.join(missing)}")
    return Check(module, True, True, "installed")


def _missing_libraries() -> list[str]:
    import ctypes.util

    if not sys.platform.startswith("linux"):
        return []
    return [] if ctypes.util.find_library("usb-1.0") else [SYSTEM_LIBRARIES["libusb-1.0.so.0"]]


def _install_name(module: str, distribution: str | None) -> str:
    return f"'d2-4d[{EXTRAS[module]}]'" if module in EXTRAS else distribution or module


def _library_hint(module: str, error: str) -> str:
    for library, package in SYSTEM_LIBRARIES.items():
        if library in error:
            return f"{module} needs the system library {library}; on Debian or Ubuntu run: apt-get install {package}"
    return f"{module} does not import: {error[:300]}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
