"""What users install: the wheel holds everything, imports outside of the repository, and its doctor is well."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from surroundings import ROOT, cli_environment

from d2 import __version__

PACKAGES = {"d2": "d2", "recon": "d2/recon", "cli": "d2/cli", "configs": "d2/configs"}  # folder -> place in the wheel


def shipped() -> dict[str, Path]:
    """Every file that belongs into the wheel, by its place in it."""
    found = {}
    for folder, place in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{place}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the repository."""
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for name, path in shipped().items():
            assert name in names, f"{name} is missing; see packages and package-data in pyproject.toml"
            assert archive.read(name) == path.read_bytes()
    assert names == shipped().keys()


def test_wheel_is_of_this_version_with_licence_and_command(wheel):
    assert wheel.name == f"d2_4d-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"d2_4d-{__version__}.dist-info"
        points = archive.read(f"{info}/entry_points.txt")
        assert b"d2 = d2.cli.app:main" in points
        for group, point in (("method_configs", b"d2-4dgs = d2.recon.nerf.method"), ("dataparser_configs", b"d2-data")):
            assert f"[nerfstudio.{group}]".encode() in points and point in points
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


SCRIPT = """
import importlib, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
for name in {modules!r}:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:  # what nerfstudio loads through the entry points, and nothing else does
        assert name.startswith("d2.recon.nerf.") and error.name.startswith("nerfstudio"), (name, error)
        continue
    assert module.__file__.startswith({place!r}), module.__file__
from d2 import config
from d2.recon.config import ReconstructConfig
from d2.settings import GenerateConfig
for preset in {presets!r}:
    if preset.startswith("generate-"):
        config.load(GenerateConfig, config.preset_path(preset.removeprefix("generate-"), "generate"))
    else:
        config.load(ReconstructConfig, preset)
from d2.cli.app import main
sys.argv = ["d2", "doctor"]
main()
"""


@pytest.mark.row(72)
def test_row_72_installed_outside_of_the_repository_every_module_imports_and_the_doctor_is_well(wheel, tmp_path):
    place = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(place),
        str(wheel),
    ]
    subprocess.run([*command, "--disable-pip-version-check"], check=True, cwd=tmp_path, timeout=120)
    names = [name.removesuffix(".py").replace("/", ".") for name in shipped() if name.endswith(".py")]
    modules = sorted(name.removesuffix(".__init__") for name in names)
    presets = sorted(Path(name).stem for name in shipped() if name.startswith("d2/configs/") and name.endswith(".yaml"))
    script = SCRIPT.format(modules=modules, place=str(place), presets=presets)
    # No optimised or cached state of the repository comes along, only what was installed.
    env = cli_environment() | {"PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"d2          {__version__}" in done.stdout or f" {__version__} on Python" in done.stdout
