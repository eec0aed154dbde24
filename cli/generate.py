"""`d2 generate`: an image, a folder of frames or a video becomes a run folder of views × frames."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2.errors import UsageError
from d2.fileio import quoted

if TYPE_CHECKING:
    from d2.asset import Asset
    from d2.generation import Generation

SOURCE = typer.Argument(
    None, help="An image, a folder of frames, a video or a GIF.", show_default=False, readable=False
)
ASSET = typer.Option(
    None, help="Instead: a mesh (glb, obj, ply, stl...) or a 3D Gaussian PLY, drawn from every view.", readable=False
)
OUT = typer.Option(None, help="Run folder to write; default: runs/<name of the input>.", readable=False)
PRESET = typer.Option("full", help="full, fast, low-vram, tiny (comes with d2), or a YAML file of fields.")
WEIGHTS = typer.Option(
    None,
    help="Folder with sv3d_p.safetensors and svd_xt.safetensors (or SVD as diffusers keeps it: unet/, vae/,"
    " image_encoder/); default: $D2_WEIGHTS or checkpoints/.",
    readable=False,
)
DEVICE = typer.Option("auto", help="auto, cpu, cuda or cuda:N.")
GPUS = typer.Option(1, min=1, max=1024, help="GPUs of this machine that share the work; with --device cpu, processes.")
SEED = typer.Option(None, help="Seed of everything random (same as --set seed=N).")
ELEVATION = typer.Option(None, help="Elevation of every view, degrees (same as --set elevation_deg=X).")
RATIO = typer.Option(None, help="Share of the picture's side that the object takes up (--set image_frame_ratio=X).")
MOTION = typer.Option(None, help="0 to 255; more moves more (same as --set motion=X).")
FPS = typer.Option(None, help="Frames a second at which the asset plays; default: a video's own, or 24.")
SETS = typer.Option([], "--set", help="field=value; repeatable (fields: d2.settings.GenerateConfig).")
VIEWS = typer.Option(
    None, help="Folder of reference views, the last one the input's, instead of sampled ones.", readable=False
)
MASK = typer.Option(None, help="A mask, or a folder of one for each frame, white on the object.", readable=False)
REMOVE = typer.Option(True, "--remove-bg/--no-remove-bg", help="Remove the background where there is no alpha.")


def generate(
    source: Path | None = SOURCE,
    asset: Path | None = ASSET,
    out: Path | None = OUT,
    preset: str = PRESET,
    weights: Path | None = WEIGHTS,
    device: str = DEVICE,
    gpus: int = GPUS,
    seed: int | None = SEED,
    elevation_deg: float | None = ELEVATION,
    image_frame_ratio: float | None = RATIO,
    motion: float | None = MOTION,
    fps: float | None = FPS,
    set: list[str] = SETS,
    views: Path | None = VIEWS,
    mask: Path | None = MASK,
    remove_bg: bool = REMOVE,
    references_only: bool = typer.Option(
        False, help="Stop after the references, to retouch them; the same command without this goes on."
    ),
    seeds: str | None = typer.Option(None, help="1,2,3: a run for each seed below OUT, and one sheet to choose by."),
    cells: str | None = typer.Option(
        None, help="views=3,4 or frames=0: sample these of a finished run again (with another --seed), keep the rest."
    ),
    dry_run: bool = typer.Option(False, help="Tell memory, arithmetic and time, then stop; weights are not needed."),
    resume: bool = typer.Option(True, "--resume/--overwrite", help="Go on with an unfinished run, or replace it."),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="Print the result as one JSON object."),
) -> None:
    """Sample all views at all moments.

    Interrupted runs resume where they stopped when the same command is repeated.
    """
    if seeds is not None and (seed is not None or cells is not None or references_only):
        raise UsageError("--seeds does not go with --seed, --cells or --references-only")
    given = the_input(source, asset)
    from d2 import budget, generation, launch, sweep
    from d2.cli import report, stop

    shortcuts = shortcut_sets(
        seed=seed, elevation_deg=elevation_deg, image_frame_ratio=image_frame_ratio, motion=motion, fps=fps
    )
    if dry_run:
        planned = budget.dry_run(source, preset, tuple(set) + shortcuts, device, gpus)
        if json:
            import dataclasses
            import json as encoder

            return typer.echo(encoder.dumps(dataclasses.asdict(planned)))
        return typer.echo(planned.text())
    with report.observer(quiet) as observer, stop.StopFlag() as should_stop:
        options = {
            "preset": preset, "sets": tuple(set) + shortcuts, "weights": weights, "device": device, "views": views,
            "mask": mask, "remove_background": remove_bg, "overwrite": not resume,
            "references_only": references_only, "processes": gpus, "observer": observer, "should_stop": should_stop,
        }  # fmt: skip
        if seeds is not None:
            name = asset or source or Path()
            folder = out if out is not None else Path("runs") / name.resolve().stem
            results = sweep.sweep(given, folder, sweep.parse_seeds(seeds), **options)
        else:
            results = [generation.generate(given, out, redo=cells, **options)]
    if launch.helps():
        return
    if json:
        import dataclasses
        import json as encoder

        records = [dataclasses.asdict(result) | {"folder": str(result.folder)} for result in results]
        typer.echo(encoder.dumps(records if seeds is not None else records[0]))
        return
    for result in results:
        _tell(result)
    if seeds is not None:
        typer.echo(f"{quoted(results[0].folder.parent / 'seeds.png')}: all seeds side by side")


def the_input(source: Path | None, asset: Path | None) -> Path | Asset:
    """The path, or the asset, opened by whoever knows its kind; exactly one of the two is given."""
    if asset is not None and source is None:
        from d2.cli import assets

        return assets.open_asset(asset)
    if source is None or asset is not None:
        raise UsageError("give either an input or --asset FILE")
    return source


def _tell(result: Generation) -> None:
    if result.finished:
        typer.echo(f"{quoted(result.folder)}: {result.views} views × {result.frames} frames in {result.seconds:.0f} s")
        typer.echo(f"Next: d2 reconstruct {shlex.quote(str(result.folder))}")
    else:
        typer.echo(
            f"{quoted(result.folder / 'generate')}: references; retouch them, then repeat without --references-only"
        )


def shortcut_sets(**values: float | None) -> tuple[str, ...]:
    """Options that stand for fields of the configuration, as --set texts."""
    return tuple(f"{key}={value}" for key, value in values.items() if value is not None)
