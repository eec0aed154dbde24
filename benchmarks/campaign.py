"""The fault campaign: crashes, damaged files, properties, long runs and the rows of faults.

    python benchmarks/campaign.py [--kills 100] [--every 1] [--ranks 8] [--n 20000] [--iterations 10000] [--assets 5]
                                  [--lanes 2] [--out FILE]

Lanes of one thread each; writes benchmarks/results/campaign.json, with the rows as tests/faults/README.md has them
(make rows writes it from a run of their tests).  The defaults take up to an hour on two cores.  Exits
with 1 when anything is not as it has to be: a case lost, an exception that is not documented, a row that fails.
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
    out: Path = RESULT,
) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="d2-campaign-") as text:
        place = Path(text)
        jobs: dict[str, list[str]] = {
            name: [script("crash"), f"--stage={name}", f"--kills={kills}", f"--every={every}", f"--ranks={ranks}"]
            for name in ("generate", "reconstruct", "export")
        }
        jobs["fuzz"] = [script("fuzz"), "--target", "all", "--n", str(n)]
        jobs["hygiene"] = [script("hygiene"), "--iterations", str(iterations), "--assets", str(assets)]
        for name, words in jobs.items():
            words += ["--out", str(place / f"{name}.json")]
        jobs["properties"] = ["-m", "pytest", "-q", "--hypothesis-profile=campaign", *PROPERTIES]
        with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
            ended = dict(zip(jobs, pool.map(lambda name: run(name, jobs[name], place), jobs), strict=True))
        record = summary(place, ended)
    record["passed"] &= record["rows"]["green"] == record["rows"]["total"]
    record["options"] = {"kills": kills, "every": every, "ranks": ranks, "n": n, "lanes": lanes}
    record["options"] |= {"iterations": iterations, "assets": assets}
    record |= {"minutes": round((time.monotonic() - begin) / 60, 1), "machine": machine.describe()}
    fileio.write_json(out, record)
    print(record)
    raise SystemExit(0 if record["passed"] else 1)


def script(name: str) -> str:
    return str(HERE / f"{name}.py")


def run(name: str, words: list[str], place: Path) -> int:
    """The exit code of one part; what it says goes to the terminal at its end."""
    begin = time.monotonic()
    call, environment = [sys.executable, *words], os.environ | ONE_THREAD
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = (done.stdout + done.stderr)[-4000:]
    print(f"{name}: exit code {done.returncode} after {(time.monotonic() - begin) / 60:.1f} min\n{said}", flush=True)
    return done.returncode


def summary(place: Path, ended: dict[str, int]) -> dict[str, Any]:
    """What was tried and what came of it."""
    record: dict[str, Any] = {"passed": not any(ended.values()), "exit_codes": ended}
    stages = {name: read(place, name).get("stages", {}).get(name, {}) for name in ("generate", "reconstruct", "export")}
    for kind in ("kills", "deaths", "ranks", "write_failures", "resumes"):
        good = "bit_equal" if kind == "resumes" else "survived"
        tallies = [stage.get(kind, {}) for stage in stages.values()]
        record[kind] = {key: sum(tally.get(key, 0) for tally in tallies) for key in ("tried", good)}
    targets = read(place, "fuzz").get("targets", {})
    record["mutations"] = {
        key: sum(tally[key] for tally in targets.values()) for key in ("mutations", "read", "refused", "undocumented")
    }
    record["rows"] = rows()
    hygiene = read(place, "hygiene")
    hygiene.pop("machine", None)
    return record | {"stages": stages, "targets": targets, "hygiene": hygiene}


def read(place: Path, name: str) -> dict[str, Any]:
    """What a part wrote; nothing where it did not get so far."""
    path = place / f"{name}.json"
    return fileio.read_json(path) if path.is_file() else {}


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
