"""The fault campaign: crashes, damaged files, properties, long runs and the rows of faults.

    python benchmarks/campaign.py [--kills 100] [--every 1] [--ranks 8] [--n 20000] [--iterations 10000] [--assets 5]
                                  [--lanes 2] [--parts generate,reconstruct,export,fuzz,hygiene,properties] [--out FILE]

Lanes of one thread each; writes benchmarks/results/campaign.json, with the rows as tests/faults/README.md has them
(make rows writes it from a run of their tests).  The defaults take up to an hour on two cores; --parts runs some again,
after what they found is mended, and keeps the others of the record.  Exits with 1 when anything is not as it has to
be: a case lost, an exception that is not documented, a row that fails.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from d2 import fileio, machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = HERE / "results" / "campaign.json"
STAGES = "generate", "reconstruct", "export"
PARTS = *STAGES, "fuzz", "hygiene", "properties"
PROPERTIES = ("tests/faults/test_states.py", "tests/faults/test_properties.py")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def main(
    kills: int = 100,
    every: int = 1,
    ranks: int = 8,
    n: int = 20000,
    iterations: int = 10000,
    assets: int = 5,
    lanes: int = 2,
    parts: str = ",".join(PARTS),
    out: Path = RESULT,
) -> None:
    options = {"kills": kills, "every": every, "ranks": ranks, "n": n, "iterations": iterations, "assets": assets}
    wanted = parts.split(",")
    if not set(wanted) <= set(PARTS):
        raise typer.BadParameter(f"expected some of {','.join(PARTS)}", param_hint="--parts")
    before = {} if set(wanted) == set(PARTS) else fileio.read_json(out)["parts"]
    with tempfile.TemporaryDirectory(prefix="d2-campaign-") as text:
        jobs = {name: words for name, words in commands(options, Path(text)).items() if name in wanted}
        with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
            done = pool.map(lambda name: run(name, jobs[name], Path(text) / f"{name}.json"), jobs)
            ended = before | dict(zip(jobs, done, strict=True))
    record = summary(ended) | {"options": options | {"lanes": lanes}, "machine": machine.describe(), "parts": ended}
    fileio.write_json(out, record)
    print(record)
    raise SystemExit(0 if record["passed"] else 1)


def commands(options: dict[str, int], place: Path) -> dict[str, list[str]]:
    """Every part's command, but for the interpreter; those that keep a record write it to `place`."""
    crash = [f"--{name}={options[name]}" for name in ("kills", "every", "ranks")]
    jobs = {name: [script("crash"), f"--stage={name}", *crash] for name in STAGES}
    jobs["fuzz"] = [script("fuzz"), "--target", "all", "--n", str(options["n"])]
    jobs["hygiene"] = [script("hygiene"), *(f"--{name}={options[name]}" for name in ("iterations", "assets"))]
    recorded = {name: [*words, "--out", str(place / f"{name}.json")] for name, words in jobs.items()}
    return recorded | {"properties": ["-m", "pytest", "-q", "--hypothesis-profile=campaign", *PROPERTIES]}


def script(name: str) -> str:
    return str(HERE / f"{name}.py")


def run(name: str, words: list[str], written: Path) -> dict[str, Any]:
    """The exit code of one part, how long it took and what it wrote; what it says goes to the terminal at its end."""
    begin = time.monotonic()
    call, environment = [sys.executable, *words], os.environ | ONE_THREAD
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    minutes = round((time.monotonic() - begin) / 60, 1)
    print(f"{name}: exit code {done.returncode} after {minutes} min\n{(done.stdout + done.stderr)[-4000:]}", flush=True)
    record = fileio.read_json(written) if written.is_file() else {}
    record.pop("machine", None)
    return {"exit_code": done.returncode, "minutes": minutes, "record": record}


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was tried and what came of it."""
    record: dict[str, Any] = {"rows": rows()}
    record["passed"] = not any(part["exit_code"] for part in parts.values())
    record["passed"] &= record["rows"]["green"] == record["rows"]["total"]
    stages = [parts[name]["record"].get("stages", {}).get(name, {}) for name in STAGES]
    for kind in ("kills", "deaths", "ranks", "write_failures", "resumes"):
        good = "bit_equal" if kind == "resumes" else "survived"
        tallies = [stage.get(kind, {}) for stage in stages]
        record[kind] = {key: sum(tally.get(key, 0) for tally in tallies) for key in ("tried", good)}
    targets = parts["fuzz"]["record"].get("targets", {})
    record["mutations"] = {
        key: sum(tally[key] for tally in targets.values()) for key in ("mutations", "read", "refused", "undocumented")
    }
    return record


def rows() -> dict[str, int]:
    """How many rows of tests/faults/README.md have tests that pass, and none that fails."""
    status: dict[str, set[str]] = {}
    for line in (ROOT / "tests" / "faults" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and cells[1].isdecimal():
            status.setdefault(cells[1], set()).add(cells[4])
    green = [row for row, seen in status.items() if "passes" in seen and "fails" not in seen]
    return {"green": len(green), "total": len(status)}


if __name__ == "__main__":
    typer.run(main)
