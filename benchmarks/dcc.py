"""What `make test-dcc` runs: the checks in other programs; their last result goes to benchmarks/results/dcc.json."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from d2 import fileio, machine

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"blender": [str(ROOT / ".venv-dcc/bin/python"), "-c", "import bpy; print(bpy.app.version_string)"]}


class Recorder:
    """Outcome and seconds of every test, and what it recorded."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/dcc/")
        entry = self.tests.setdefault(name, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(float(str(entry["seconds"])) + report.duration, 2)
        for key, value in report.user_properties if report.when == "call" else ():
            entry.setdefault(key, []).append(value)  # type: ignore[union-attr]
        if report.outcome != "passed":
            entry["outcome"] = report.outcome


def main() -> int:
    recorder = Recorder()
    code = pytest.main(["--rootdir", str(ROOT), "-m", "dcc", str(ROOT / "tests/dcc")], plugins=[recorder])
    versions = {}
    for name, call in PROGRAMS.items():
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        versions[name] = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "absent"
    record = {"machine": machine.describe(), "programs": versions, "tests": recorder.tests}
    fileio.write_json(ROOT / "benchmarks/results/dcc.json", record)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
