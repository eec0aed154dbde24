"""`d2 batch`: many assets, each from input to exported files, on one machine or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2.cli import generate as options
from d2.errors import Stopped, UsageError, WorkerError
from d2.fileio import quoted

if TYPE_CHECKING:
    from d2.cli.fleet import Record

INPUTS = typer.Argument(
    help="Pictures, videos, meshes, folders of frames, datasets with transforms.json, run folders; patterns"
    " ('shots/*.png'); manifests: .csv with a column input (and name, seed, preset...), or .jsonl."
)


def batch(
    inputs: list[str] = INPUTS,
    out: Path = typer.Option(
        Path("runs"), help="Folder that gets a run folder for each asset, and logs/.", readable=False
    ),
    workers: int | None = typer.Option(
        None, min=1, max=1024, help="Assets at a time on this machine; default: --per-gpu for each GPU, or 1."
    ),
    device: str = typer.Option(
        "auto", help="auto (every GPU), cpu, or a comma list (cuda:0,cuda:1) dealt out in turn."
    ),
    per_gpu: int = typer.Option(1, min=1, max=64, help="Assets that share a GPU."),
    ray: str | None = typer.Option(
        None, help="Instead of this machine: auto or HOST:PORT of a Ray cluster, or local to start one here."
    ),
    preset: str = options.PRESET,
    reconstruct_preset: str = typer.Option("quality", help="Of the reconstruction: quality, fast, or a YAML file."),
    weights: Path | None = options.WEIGHTS,
    set: list[str] = options.SETS,
    reconstruct_set: list[str] = typer.Option([], "--reconstruct-set", help="field=value of the reconstruction."),
    remove_bg: bool = options.REMOVE,
    retries: int = typer.Option(1, min=0, max=100, help="More attempts where a process was killed or lacked memory."),
    resume: bool = typer.Option(True, "--resume/--overwrite", help="Keep what is finished, or make everything anew."),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="Print the table as one JSON list."),
) -> None:
    """Make many assets: generate, reconstruct and export each, a fixed number at a time.

    Repeat the same command to go on after an interruption or to try failures again; finished assets are kept.
    Datasets and run folders are reconstructed and exported only.  A failure stops no other asset; exit code 7.
    """
    if ray not in (None, "local") and workers is not None:
        raise UsageError("--workers is of this machine; a Ray cluster has its own: leave it out")
    from d2 import destination, fileio
    from d2.cli import fleet, jobs, report, stop

    wanted = jobs.read_jobs(inputs)
    devices = _devices(device)
    count = workers or (per_gpu * len(devices) if devices[0].startswith("cuda") else 1)
    destination.require_space(out, 0)
    settings = fleet.Settings(
        out.resolve(), preset, reconstruct_preset, tuple(set), tuple(reconstruct_set),
        None if weights is None else str(weights.resolve()), remove_bg, not resume, retries, _threads(count, ray),
    )  # fmt: skip
    found = {job.name: fleet.finished(job, settings) for job in wanted}
    records = {name: record for name, record in found.items() if record is not None}
    todo = [job for job in wanted if job.name not in records]
    with report.observer(quiet) as observer, stop.StopFlag() as should_stop:
        if records:
            observer.message(f"{len(records)} of {len(wanted)} assets are finished")
        if ray is None:
            results = fleet.locally(todo, settings, min(count, len(todo) or 1), devices, should_stop)
        else:
            results = fleet.on_ray(todo, settings, ray, workers, device, per_gpu, should_stop) if todo else iter(())
        for record in results:
            records[record.name] = record
            observer.message(f"{record.name}: {_state(record)}" + (f": {record.error}" if record.error else ""))
            observer.phase("assets", len(records), len(wanted))
        signum = should_stop()
    ordered = [records[job.name] for job in wanted if job.name in records]
    _tell(ordered, json)
    done, failed = sum(not r.code for r in ordered), [r for r in ordered if r.code]
    if signum:
        raise Stopped(f"stopped with {done} of {len(wanted)} assets done; repeat the same command to go on", signum)
    if failed:
        names = ", ".join(record.name for record in failed[:5]) + (", ..." if len(failed) > 5 else "")
        where = fileio.quoted(out / fleet.LOGS)
        raise WorkerError(f"{len(failed)} of {len(wanted)} assets failed: {names}; logs are in {where}")


def _devices(text: str) -> list[str]:
    """The devices that --device names, every GPU for auto. Raises InputError and SetupError."""
    import torch

    from d2 import machine

    if text == "auto" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(machine.choose_device(name.strip())) for name in text.split(",")]


def _threads(workers: int, ray: str | None) -> int:
    """CPU threads of each process: its share of the cores; a Ray task asks for one."""
    from d2 import machine

    return 1 if ray is not None else max(1, machine.available_cores() // workers)


def _state(record: Record) -> str:
    if record.code:
        return f"failed ({record.code})"
    return "kept" if record.kept else "done"


def _tell(records: list[Record], as_json: bool) -> None:
    """The table: a line for each asset."""
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(record) for record in records]))
        return
    width = max([len(quoted(record.name)) for record in records], default=0)
    for record in records:
        psnr = "" if record.psnr is None else f"{record.psnr:.2f} dB"
        count = "" if record.gaussians is None else f"{record.gaussians} Gaussians"
        row = f"{quoted(record.name):<{width}}  {_state(record):<11} {record.seconds:>8.0f} s  {psnr:>9}  {count:<16}"
        typer.echo(f"{row} {record.error}".rstrip())
