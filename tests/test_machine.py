import importlib
import importlib.metadata
import json

import pytest

from d2 import machine
from d2.errors import SetupError


@pytest.fixture
def failing_import(monkeypatch):
    """Makes importlib.import_module raise a given error."""

    def arrange(error: Exception) -> None:
        def fail(name: str):
            raise error

        monkeypatch.setattr(importlib, "import_module", fail)

    return arrange


@pytest.mark.parametrize(("library", "package"), machine.SYSTEM_LIBRARIES.items())
@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_a_missing_system_library_gives_one_line_with_its_package(failing_import, library, package, kind):
    failing_import(kind(f"{library}: cannot open shared object file: No such file or directory"))
    with pytest.raises(SetupError) as caught:
        machine.require("open3d")
    assert library in str(caught.value) and f"apt-get install {package}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.row(60)
@pytest.mark.parametrize(
    ("module", "install"), [("open3d", "'d2-4d[mesh]'"), ("nerfstudio", "'d2-4d[nerfstudio]'"), ("plyfile", "plyfile")]
)
def test_a_missing_module_gives_the_install_line(failing_import, module, install):
    failing_import(ModuleNotFoundError(f"No module named {module!r}", name=module))
    with pytest.raises(SetupError, match="is not installed; run: pip install ") as caught:
        machine.require(module)
    assert str(caught.value).endswith(install)


def test_a_module_that_its_module_needs_is_named(failing_import):
    failing_import(ModuleNotFoundError("No module named 'sklearn'", name="sklearn"))
    with pytest.raises(SetupError, match="open3d needs sklearn; run: pip install sklearn"):
        machine.require("open3d")


def test_any_other_failure_of_an_import_is_quoted(failing_import):
    failing_import(ImportError("undefined symbol: foo"))
    with pytest.raises(SetupError, match="open3d does not import: undefined symbol: foo"):
        machine.require("open3d")


def test_a_module_that_is_there_is_returned():
    assert machine.require("json") is json


def test_doctor_survives_a_torch_without_its_libraries(monkeypatch):
    import builtins

    real = builtins.__import__

    def no_torch(name, *rest, **named):
        if name == "torch":
            raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    checks = {check.name: check for check in machine.checks()}
    assert not checks["cuda"].ok and not checks["cuda"].optional
    assert "apt-get install libgomp1" in checks["cuda"].detail
    assert not checks["rasterizer"].ok


def test_doctor_names_the_library_open3d_lacks(monkeypatch):
    import ctypes.util
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    check = {check.name: check for check in machine.checks()}["open3d"]
    assert not check.ok and check.optional and "apt-get install libusb-1.0-0" in check.detail


def test_dependencies_are_listed_with_version_and_licence():
    found = machine.dependencies()
    assert found["torch"]["version"] == importlib.metadata.version("torch") and "BSD" in str(found["torch"]["licence"])
    assert found["numpy"]["extra"] is None and found["usd-core"]["extra"] == "usd" and "pytest" not in found
    assert all(entry["licence"] for entry in found.values() if entry["version"])


def test_description_of_the_machine_fits_json_and_names_cpu_and_versions():
    record = json.loads(json.dumps(machine.describe(), allow_nan=False))
    assert record["cores"] >= 1 and record["cpu"] and record["torch"] and record["d2"]
