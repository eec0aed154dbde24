"""Whether a wrong rig is found: orbits that turn the other way, lenses and elevations that are not what was said.

    python benchmarks/rig.py DATASET… [--size 128]

Each DATASET holds transforms_train.json.  What it says of its cameras is made wrong, one kind at a time
(benchmarks/perturb.py), and d2.recon.rig.refine is asked what is right.  Writes benchmarks/results/rig.json as it
goes: what was found beside the truth; what is there is kept.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import typer
from perturb import perturb

from d2 import config as configuration
from d2 import fileio, machine
from d2.recon import dataset, pipeline, rig
from d2.recon.config import ReconstructConfig

RESULTS = Path(__file__).parent / "results" / "rig.json"
KINDS = "clean", "mirror", "fov", "elevation"


def main(datasets: list[Path], size: int = 128, out: Path = RESULTS) -> None:
    record: dict[str, Any] = fileio.read_json(out, fileio.MB) if out.is_file() else {"rows": {}}
    settings = pipeline.settled(configuration.load(ReconstructConfig, "quality"), generated=True)
    for folder in datasets:
        true = dataset.load(folder, "train", size)
        for kind in KINDS:
            rows = record["rows"].setdefault(folder.name, {})
            if kind in rows:
                continue
            believed = true if kind == "clean" else perturb(true, kind)
            begin = time.process_time()
            with pipeline.kernel_threads():
                refined, found = rig.refine(believed, settings, 0)
            focal = float(refined.Ks[0, 0, 0] / true.Ks[0, 0, 0])
            rise = math.degrees(found.elevation) + (5 if kind == "elevation" else 0)
            rows[kind] = found.as_dict() | {
                "mirror_right": found.mirrored == (kind == "mirror"),
                "focal_error_percent": round(100 * (focal - 1), 2),
                "elevation_error_deg": round(rise, 3),
                "cpu_seconds": round(time.process_time() - begin, 1),
            }
            print(folder.name, kind, rows[kind], flush=True)
            record |= {"size": size, "machine": machine.describe()}
            fileio.write_json(out, record)


if __name__ == "__main__":
    typer.run(main)
