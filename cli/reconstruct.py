"""`d2 reconstruct`: a folder of multi-view video becomes 4D Gaussians."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from d2.fileio import quoted


def reconstruct(
    path: Path = typer.Argument(
        help="A run folder, or any folder with transforms.json (nerfstudio, Blender layout).", readable=False
    ),
    out: Path | None = typer.Option(
        None, help="Run folder to write; default: PATH if it is a run, else runs/<name>.", readable=False
    ),
    name: str = typer.Option("main", help="Name of this reconstruction within the run."),
    preset: str = typer.Option("quality", help="quality, fast, or a YAML file of fields."),
    set: list[str] = typer.Option(
        [], "--set", help="field=value; repeatable (fields: d2.recon.config.ReconstructConfig)."
    ),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    max_gaussians: int | None = typer.Option(None, help="Budget of Gaussians (same as --set max_gaussians=N)."),
    size: int | None = typer.Option(None, help="Longer side in pixels to fit at (same as --set size=N)."),
    fps: float | None = typer.Option(None, min=0.1, max=1000, help="Playback rate recorded in a new run folder."),
    overwrite: bool = typer.Option(False, help="Replace a finished reconstruction, after success."),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="Print the result as one JSON object."),
) -> None:
    """Fit 4D Gaussians to posed multi-view video.

    Interrupted runs resume where they stopped when the same command is repeated.
    """
    from d2.cli import report, stop
    from d2.recon.pipeline import reconstruct as run

    shortcuts = {"max_gaussians": max_gaussians, "size": size}
    sets = tuple(set) + tuple(f"{key}={value}" for key, value in shortcuts.items() if value is not None)
    with report.observer(quiet) as observer, stop.StopFlag() as should_stop:
        result = run(
            path, out, name=name, preset=preset, sets=sets, device=device, overwrite=overwrite, fps=fps,
            observer=observer, should_stop=should_stop,
        )  # fmt: skip
    if json:
        import dataclasses
        import json as encoder

        typer.echo(
            encoder.dumps({k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(result).items()})
        )
    else:
        quality = "" if result.psnr is None else f", {result.psnr:.2f} dB on held-out cells"
        typer.echo(f"{quoted(result.model)}: {result.gaussians} Gaussians{quality}")
        run_folder = shlex.quote(str(result.folder.parent.parent))
        typer.echo(f"Next: d2 export {run_folder} --format ply,mp4,contact")
