"""`d2 run`: from input to exported 4D asset in one command."""

from __future__ import annotations

from pathlib import Path

import typer

from d2.cli import generate as options
from d2.fileio import quoted

EXPORTS = ("ply", "mp4", "contact", "html")


def run(
    source: Path | None = options.SOURCE,
    asset: Path | None = options.ASSET,
    out: Path | None = options.OUT,
    preset: str = options.PRESET,
    reconstruct_preset: str = typer.Option("quality", help="Of the reconstruction: quality, fast, or a YAML file."),
    weights: Path | None = options.WEIGHTS,
    device: str = options.DEVICE,
    gpus: int = options.GPUS,
    seed: int | None = options.SEED,
    elevation_deg: float | None = options.ELEVATION,
    image_frame_ratio: float | None = options.RATIO,
    motion: float | None = options.MOTION,
    fps: float | None = options.FPS,
    set: list[str] = options.SETS,
    reconstruct_set: list[str] = typer.Option([], "--reconstruct-set", help="field=value of the reconstruction."),
    views: Path | None = options.VIEWS,
    mask: Path | None = options.MASK,
    remove_bg: bool = options.REMOVE,
    resume: bool = typer.Option(True, "--resume/--overwrite", help="Go on where it stopped, or replace everything."),
    quiet: bool = typer.Option(False, help="No progress."),
) -> None:
    """Generate, reconstruct and export.

    Repeat the same command to go on after an interruption; finished stages are kept.
    """
    given = options.the_input(source, asset)
    from d2.cli import report, stop
    from d2.generation import generate
    from d2.launch import helps
    from d2.recon import export, reconstruct
    from d2.run import Run

    shortcuts = options.shortcut_sets(
        seed=seed, elevation_deg=elevation_deg, image_frame_ratio=image_frame_ratio, motion=motion, fps=fps
    )
    with report.observer(quiet) as observer, stop.StopFlag() as should_stop:
        made = generate(
            given, out, preset=preset, sets=tuple(set) + shortcuts, weights=weights, device=device, views=views,
            mask=mask, remove_background=remove_bg, overwrite=not resume, keep_finished=resume,
            processes=gpus, observer=observer, should_stop=should_stop,
        )  # fmt: skip
        if helps():
            return
        if Run.open(made.folder).stage("reconstruct:main") is None:
            reconstruct(
                made.folder, preset=reconstruct_preset, sets=tuple(reconstruct_set), device=device,
                observer=observer, should_stop=should_stop,
            )  # fmt: skip
        observer.message("Exporting " + ", ".join(EXPORTS))
    for what, target in export(made.folder, list(EXPORTS), overwrite=True).items():
        typer.echo(f"{what}: {quoted(target)}")
