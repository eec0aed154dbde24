"""`d2 bench`: measurements on the user's own data."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(help="Measure quality and speed on your own data.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure quality and speed on your own data."""


@app.command()
def reconstruct(
    dataset: Path = typer.Argument(
        help="A folder with transforms_train.json and transforms_test.json.", readable=False
    ),
    size: int = typer.Option(128, min=8, max=4096, help="Longer image side in pixels, area-filtered."),
    seconds: float = typer.Option(120.0, min=0.1, help="Training time; compilation and initialisation come on top."),
    preset: str = typer.Option("quality", help="quality, fast, or a YAML file of fields."),
    set: list[str] = typer.Option([], "--set", help="field=value; repeatable."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    out: Path | None = typer.Option(
        None, help="Folder for the model and a sheet of the worst test views.", readable=False
    ),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="One JSON object on stdout."),
) -> None:
    """Train on one set of views, report on the other."""
    from d2.cli import report
    from d2.recon import benchmark

    with report.observer(quiet) as observer:
        result = benchmark.reconstruct(dataset, size, seconds, preset, tuple(set), device, out, observer)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(result))
        return
    for key, value in result.items():
        typer.echo(f"{key:>16}  {value}")


@app.command()
def evaluate(
    models: list[Path] = typer.Argument(
        metavar="RUN...",
        help="Run folders, reconstructions in them, or gaussians.safetensors; several are seeds.",
        readable=False,
    ),
    truth: Path = typer.Option(help="A folder with transforms_test.json, else transforms.json.", readable=False),
    size: int | None = typer.Option(
        None, min=8, max=4096, help="Longer image side in pixels, area-filtered; default: as the pictures are."
    ),
    points: Path | None = typer.Option(
        None,
        help="True points: a PLY file, or a folder of one a moment; default: points/ in the dataset, where it is.",
        readable=False,
    ),
    lpips_weights: Path | None = typer.Option(
        None,
        help="LPIPS with AlexNet or VGG16 (all of its state, as safetensors).",
        readable=False,
    ),
    clip_weights: Path | None = typer.Option(None, help="OpenCLIP ViT-H/14, safetensors.", readable=False),
    i3d_weights: Path | None = typer.Option(None, help="I3D (RGB, Kinetics-400) for FVD, safetensors.", readable=False),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    out: Path | None = typer.Option(None, help="Folder for results.json, plots.png and worst.png.", readable=False),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="One JSON object on stdout."),
) -> None:
    """Compare reconstructions with pictures they have not seen; mean ± standard deviation over several.

    PSNR, SSIM, MS-SSIM, flicker, agreement between neighbouring views, geometry; LPIPS, CLIP-I and FVD with weights.
    """
    from d2.cli import report
    from d2.recon import evaluation, evaluation_report

    weights = evaluation.Weights(lpips_weights, clip_weights, i3d_weights)
    with report.observer(quiet) as observer:
        result = evaluation.evaluate(
            models, truth, size=size, points=points, weights=weights, device=device, out=out, observer=observer
        )
    if json:
        import json as encoder

        typer.echo(encoder.dumps(result))
        return
    typer.echo(evaluation_report.as_text(result))


@app.command()
def dnerf(
    folder: Path = typer.Argument(
        help="One D-NeRF scene, or the folder of several: transforms_{train,val,test}.json.", readable=False
    ),
    seconds: float = typer.Option(120.0, min=0.1, help="Training time of each scene."),
    preset: str = typer.Option("quality", help="quality, fast, or a YAML file of fields."),
    set: list[str] = typer.Option([], "--set", help="field=value; repeatable."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="One JSON object on stdout."),
) -> None:
    """Measure by D-NeRF's protocol: its 800² pictures at 400² on white, fitted to train, tested on test."""
    from d2.cli import report
    from d2.recon import dnerf as protocol

    with report.observer(quiet) as observer:
        result = protocol.measure(folder, seconds, preset, tuple(set), device, observer)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(result))
        return
    typer.echo(protocol.as_text(result))


@app.command()
def composition(
    toys: int = typer.Option(32, min=1, max=100_000, help="Toys of the test split."),
    few: int = typer.Option(8, min=1, help="How many of them go through every mode, schedule and control."),
    preset: str = typer.Option("tiny", help="Preset of d2 generate, or a YAML file of fields."),
    weights: Path | None = typer.Option(
        None,
        help="Folder of the pair's checkpoints; default: those that come with d2.",
        readable=False,
    ),
    set: list[str] = typer.Option([], "--set", help="field=value of d2 generate; repeatable."),
    work: Path | None = typer.Option(
        None,
        help="Folder where the samples stay; a repeated command goes on from there.",
        readable=False,
    ),
    processes: int = typer.Option(2, min=1, max=256, help="Toys at a time, one thread each."),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="One JSON object on stdout."),
) -> None:
    """Compare composed samples with single models' on toys whose every view is known."""
    from d2.cli import report
    from d2.recon import composition as measured

    with report.observer(quiet) as observer:
        result = measured.composition(toys, few, preset, weights, tuple(set), work, processes, observer)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(result))
        return
    typer.echo(measured.as_text(result))
