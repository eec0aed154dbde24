"""The rows of faults and bad input: what each is, which tests hold it, and the table of them in README.md.

A test says which rows it holds: `@pytest.mark.row(41, 42)`.  `pytest --rows` (make rows) runs these tests alone and
writes the table anew.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest
from surroundings import ROOT

MARK = "pytest.mark.row"
README = Path(__file__).parent / "README.md"
ROWS = {
    1: "input that does not exist",
    2: "folder without images",
    3: "frames in natural order",
    4: "files that only pretend to be images",
    7: "no foreground",
    9: "frames of different sizes",
    10: "long pictures, objects at the border",
    11: "too few or too many frames",
    12: "FIFO, folder or link loop in the place of an image",
    13: "file names with spaces, line breaks, any letters",
    14: "files that may not be read",
    15: "unknown setting",
    17: "YAML that would run code",
    19: "setting out of range",
    20: "wrong command line",
    21: "folder of another version",
    22: "impossible seed",
    23: "help without torch",
    24: "no weights",
    26: "damaged weights",
    27: "weights of another model",
    29: "weights that hold NaN",
    30: "output that is finished",
    31: "output that cannot be a folder",
    32: "two processes on one run",
    33: "damaged manifest",
    35: "image of a run gone or changed",
    36: "run that is not finished",
    37: "bad transforms.json",
    38: "datasets of other tools",
    41: "SIGTERM",
    42: "SIGINT, once and twice",
    44: "full disk before the work",
    45: "resume with something else",
    46: "damaged state or checkpoint",
    47: "clock that goes backwards",
    48: "rename or fsync that fails",
    49: "odd terminals, closed pipes, no home",
    50: "denoiser that gives NaN",
    51: "loss that leaves the finite numbers",
    53: "no Gaussian left, or one",
    54: "extreme values in the rasterizer",
    55: "any number of ranks",
    57: "a rank lost, somebody else's MASTER_ADDR",
    58: "memory that runs out in the models",
    59: "memory that runs out elsewhere",
    60: "GPU or package that is not there",
    61: "Ctrl-C while modules are imported",
    63: "wrong PLY and splat files",
    64: "NaN in splat files",
    65: "splat formats there and back",
    66: "SPZ that lies or explodes",
    67: "export to places that are taken or cannot be",
    69: "who may talk to the viewer",
    70: "port in use, clients that say nothing",
    71: "Ctrl-C on the viewer",
    72: "the wheel on its own",
    73: "the commands of the README",
}
HEAD = """# Faults and bad input

Every row is held by tests, and `make rows` writes this page from a run of them.  What they share is in assertions.py:
the exit code, one line that begins with `error: `, no traceback, every file as it was, and an end in seconds.

| row | what | test | status |
|---|---|---|---|
"""
_LINE = re.compile(r"\| (\d+) \| [^|]* \| \[[^]]*\]\(([^)]*)\) \| (\w+) \|")
_PREFIX = re.compile(r"^test_(rows?(_\d+|_to)+_)?")


@functools.cache
def tests_of_rows() -> list[tuple[int, str, str]]:
    """(row, file as a link from the table, test), read from the sources."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                marks = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == MARK]
                rows = [ast.literal_eval(argument) for mark in marks for argument in mark.args]
                found += [(row, _relative(path), node.name) for row in rows]
    return sorted(found, key=lambda entry: entry[0])


def _relative(path: Path) -> str:
    """A test file as a link from tests/faults."""
    inside = path.relative_to(ROOT / "tests")
    return inside.name if inside.parts[0] == "faults" else f"../{inside.as_posix()}"


def table(status: dict[tuple[str, str], str]) -> str:
    """The page; `status` of (link, test) is passes, fails or skipped."""
    lines = []
    for row, file, test in tests_of_rows():
        sentence = _PREFIX.sub("", test).replace("_", " ")
        lines.append(f"| {row} | {ROWS[row]} | [{sentence}]({file}#{test}) | {status.get((file, test), 'unknown')} |\n")
    return HEAD + "".join(lines)


def statuses(text: str) -> dict[tuple[str, str], str]:
    """What a page says."""
    found = {}
    for _, target, status in _LINE.findall(text):
        file, _, test = target.partition("#")
        found[file, test] = status
    return found


_outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", action="store_true", help="run the tests of the rows, and write tests/faults/README.md")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--rows"):
        items[:] = [item for item in items if item.get_closest_marker("row")]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        file, _, name = report.nodeid.partition("::")
        _outcomes[_relative(ROOT / file), name.partition("[")[0]].add(report.outcome)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--rows") and not hasattr(session.config, "workerinput"):
        status = {
            test: "fails" if "failed" in seen else "passes" if "passed" in seen else "skipped"
            for test, seen in _outcomes.items()
        }
        told = statuses(README.read_text(encoding="utf-8")) if README.exists() else {}
        README.write_text(table(told | status), encoding="utf-8")  # of tests that did not run it says what it said
