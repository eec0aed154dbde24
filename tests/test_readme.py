"""README.md keeps its word: its commands run, its links lead somewhere, its numbers are those of the results files.

Conventions that the checks rest on:
- ```sh blocks run from top to bottom in one folder that holds tests/data, each with `bash -e`.  `d2` is replaced by a
  command that adds tiny settings (TINY).  Lines that install or fetch (INSTALL) do not run; `python benchmarks/x.py`
  takes minutes, so there the script must exist and compile.
- ```python blocks run afterwards in the same folder, with the same settings.
- A table row that links to a results file (benchmarks/results/x.json) takes its numbers from there.  The header of a
  column names the key in backticks, as `psnr` or `scenes.0.ms`; a cell may name its own in a comment,
  <!-- psnr_worst -->.  The first column is a label.  A number of any other cell in such a row is an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from surroundings import ROOT, cli_environment

TINY = {
    "run": "--set steps=2 --reconstruct-set iterations=20 --reconstruct-set size=32 --reconstruct-set refine_rig=false",
    "reconstruct": "--set iterations=20 --set size=32 --set refine_rig=false",
    "bench reconstruct": "--seconds 1 --size 32",
}
INSTALL = re.compile(r"(git clone|cd|make|pip|pipx|uv|python3? -m (pip|venv)|source|\. |sudo|apt-get|\S*/pip)\b")
BENCHMARK = re.compile(r"\S*python3? (benchmarks/\S+\.py)")
COMMAND = re.compile(r"(?:\.venv/bin/)?d2\b")
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")

SHIM = """#!/usr/bin/env bash
extra=""
case "$1 $2" in
    "bench reconstruct") extra="{bench}" ;;
    "run "*) extra="{run}" ;;
    "reconstruct "*) extra="{reconstruct}" ;;
esac
exec "{python}" -m d2.cli.app "$@" $extra
"""

PRELUDE = """
from d2.recon import pipeline
_whole = pipeline.reconstruct
def _tiny(*words, sets=(), **options):
    return _whole(*words, sets=(*sets, "iterations=20", "size=32", "refine_rig=false"), **options)
pipeline.reconstruct = _tiny
from d2 import generation
_all_steps = generation.generate
def _two_steps(*words, sets=(), **options):
    return _all_steps(*words, sets=(*sets, "steps=2"), **options)
generation.generate = _two_steps
"""


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Line number and content of every fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start()].count("\n") + 1, match[1]) for match in found]


def runnable(block: str, root: Path) -> str:
    """What of a shell block the test runs; a line it does not know is an error, not a skip."""
    kept = []
    for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
        command = re.sub(r"(^|\s)#.*", "", line).strip()
        benchmark = BENCHMARK.match(command)
        if benchmark:
            compile((root / benchmark[1]).read_text(encoding="utf-8"), benchmark[1], "exec")
        elif COMMAND.match(command):
            kept.append(COMMAND.sub("d2", command, count=1))
        elif command and not INSTALL.match(command):
            raise AssertionError(f"neither a d2 command nor one that installs: {line!r}")
    return "\n".join(kept)


def broken_links(text: str, root: Path) -> list[str]:
    """Relative links and images whose file is not there, and #anchors without their heading."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+?)\s*$", prose, re.M)}
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        if (not path and anchor not in anchors) or (path and not (root / path).exists()):
            broken.append(target)
    return broken


def wrong_numbers(text: str, root: Path) -> list[str]:
    """Numbers in table rows that name a results file and are not what it says."""
    wrong, header = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []
        if not cells or not header:
            header = cells
            continue
        named = re.search(r"benchmarks/results/[\w./-]+\.json", line)
        if not named:
            continue
        results = json.loads((root / named[0]).read_text())
        for title, cell in list(zip(header, cells, strict=True))[1:]:
            wrong += wrong_cell(title, cell, results, named[0])
    return wrong


def wrong_cell(title: str, cell: str, results: object, file: str) -> list[str]:
    shown = re.sub(r"\[[^\]]*\]\([^)]*\)|<!--.*?-->", "", cell)  # links and comments are no numbers
    number = NUMBER.search(shown)
    if not number:
        return []
    key = re.search(r"<!--\s*([\w.@]+)\s*-->", cell) or re.search(r"`([\w.@]+)`", title)
    if not key:
        return [f"{shown!r} names no key of {file}"]
    value: object = results
    for part in key[1].split("."):
        value = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else None
    text = number[0].replace(",", "").replace("−", "-")
    half_digit = 0.5 * 10.0 ** -len(text.partition(".")[2])
    if not isinstance(value, int | float) or abs(value - float(text)) > half_digit * (1 + 1e-9):
        return [f"{key[1]} is {value} in {file}, not {text}"]
    return []


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where README's commands run: a folder with the test data, and a d2 with tiny settings on its path."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "tests" / "data", folder / "tests" / "data")
    shim = folder / ".bin" / "d2"
    shim.parent.mkdir()
    settings = {"bench": TINY["bench reconstruct"], "reconstruct": TINY["reconstruct"], "run": TINY["run"]}
    shim.write_text(SHIM.format(python=sys.executable, **settings))
    shim.chmod(0o755)
    return folder


def run(words: list[str], place: Path) -> None:
    path = os.pathsep.join([str(place / ".bin"), os.environ["PATH"]])
    done = subprocess.run(
        words,
        cwd=place,
        env=cli_environment() | {"PATH": path, "BROWSER": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


@pytest.mark.row(73)
def test_row_73_every_command_of_readme_runs(readme, place):
    commands = [runnable(block, ROOT) for _, block in blocks(readme, "sh")]
    assert any(commands), "README.md shows no d2 command"
    for text in filter(None, commands):
        run(["bash", "-e", "-c", text], place)


@pytest.mark.row(73)
@pytest.mark.parametrize("number", range(2))
def test_row_73_every_python_block_of_readme_runs(readme, place, number):
    found = blocks(readme, "python")
    assert len(found) == 2, "range(2) above counts them"
    run([sys.executable, "-c", PRELUDE + found[number][1]], place)


def test_every_fenced_block_of_readme_names_its_language(readme):
    fences = re.findall(r"^```(\w*)$", readme, re.M)[::2]
    assert set(fences) <= {"sh", "python", "text", "json", "yaml", "bibtex"}, fences


def test_every_link_of_readme_leads_somewhere(readme):
    assert broken_links(readme, ROOT) == []


def test_numbers_of_readme_are_those_of_the_results_files(readme):
    assert wrong_numbers(readme, ROOT) == []


# -- the checks themselves -------------------------------------------------------------------------------------

SAMPLE = """# A sample

See [the notes](notes.md), [below](#two-words) and ![a picture](none.png) or [out](https://example.org/x).

## Two words

| scene | `psnr` dB | `ms.forward` | time | file |
|---|---|---|---|---|
| panda 25 | 29.6 | 1,234 | 120 s <!-- seconds --> | [r](benchmarks/results/r.json) |
| other | 29.7 | 1,235 | 119 | [r](benchmarks/results/r.json) |
| no file | 1 | 2 | 3 | |

```sh
git clone somewhere   # fetch
d2 --version          # comment
d2 reconstruct tests/data/panda \\
    --out "runs/#1"
```

```python
print("hello")
```
"""


@pytest.fixture
def sample(tmp_path) -> Path:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    results = {"psnr": 29.57, "seconds": 120.02, "ms": {"forward": 1234.4}}
    (tmp_path / "benchmarks" / "results" / "r.json").write_text(json.dumps(results))
    (tmp_path / "benchmarks" / "fine.py").write_text("print(1)")
    (tmp_path / "benchmarks" / "broken.py").write_text("print(")
    return tmp_path


def test_blocks_are_found_with_their_line():
    assert [line for line, _ in blocks(SAMPLE, "sh")] == [13] and blocks(SAMPLE, "python")[0][1] == 'print("hello")\n'


def test_installing_lines_and_comments_do_not_run_and_continued_lines_are_one(sample):
    lines = runnable(blocks(SAMPLE, "sh")[0][1], sample).splitlines()
    assert lines == ["d2 --version", 'd2 reconstruct tests/data/panda --out "runs/#1"']


def test_a_line_the_check_does_not_know_is_an_error(sample):
    with pytest.raises(AssertionError, match="neither"):
        runnable("rm -rf /", sample)


def test_benchmark_scripts_must_exist_and_compile(sample):
    assert runnable("python benchmarks/fine.py --all", sample) == ""
    with pytest.raises(FileNotFoundError):
        runnable("python benchmarks/none.py", sample)
    with pytest.raises(SyntaxError):
        runnable("python benchmarks/broken.py", sample)


def test_links_that_lead_nowhere_are_found(sample):
    assert broken_links(SAMPLE + '[x](#three) <img src="gone.svg">', sample) == ["none.png", "#three", "gone.svg"]


def test_numbers_that_differ_or_name_no_key_are_found(sample):
    assert wrong_numbers(SAMPLE, sample) == [
        "psnr is 29.57 in benchmarks/results/r.json, not 29.7",
        "ms.forward is 1234.4 in benchmarks/results/r.json, not 1235",
        "'119' names no key of benchmarks/results/r.json",
    ]


def test_a_command_that_fails_fails_the_check(place):
    with pytest.raises(AssertionError, match="nosuch"):
        run(["bash", "-e", "-c", "d2 nosuch\nd2 --version"], place)
    run(["bash", "-e", "-c", "d2 --version"], place)
