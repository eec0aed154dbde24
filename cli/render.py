"""`d2 render`: a reconstruction as video or as pictures, along a camera path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2.errors import InputError
from d2.fileio import quoted


def render(
    source: Annotated[
        Path, typer.Argument(help="A run folder, a reconstruction's folder or a gaussians.safetensors.", readable=False)
    ],
    path: Annotated[
        str,
        typer.Option(
            "--path",
            "--camera-path",
            help="turntable (one turn, time stands), orbit-time (one turn while the clip plays in whole loops), bullet"
            " (time stands in mid-clip while the camera goes round), input (the input's own camera), or a file:"
            " nerfstudio's camera_path.json or a transforms.json.",
        ),
    ] = "turntable",
    format: Annotated[
        str | None,
        typer.Option(help="mp4, webm, prores, gif, webp, png or exr; default: what the suffix of --out says, or mp4."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File or folder; default: render/ beside the Gaussians.", readable=False)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="WxH in pixels, or one number for both; default: 512, or the camera file's. Odd sides grow by"
            " a repeated row or column in mp4 and webm, which want even ones."
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; default: the run's. The speed stays.")] = None,
    seconds: Annotated[float | None, typer.Option(help="About how long the turns take in all; default: 4.")] = None,
    turns: Annotated[int | None, typer.Option(help="Times round; negative: the other way. Default: 1.")] = None,
    time: Annotated[float | None, typer.Option(help="The moment at which time stands, 0 to 1; default: 0.5.")] = None,
    elevation_deg: Annotated[
        float | None, typer.Option(help="Of the camera above the horizon, in degrees; default: 10.")
    ] = None,
    fov_deg: Annotated[float | None, typer.Option(help="Horizontal field of view in degrees; default: 33.8.")] = None,
    background: Annotated[
        str | None,
        typer.Option(help="white, black, transparent or #rrggbb; default: white for mp4 and gif, else transparent."),
    ] = None,
    beside_input: Annotated[
        bool, typer.Option("--beside-input", help="The input at the left, at the same time.")
    ] = False,
    passes: Annotated[
        str, typer.Option(help="Comma list of alpha, depth: files beside it; in EXR depth is channel Z.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: paths, size, frames, fps.")] = False,
) -> None:
    """Render video, PNG or EXR of a reconstruction: turntable, bullet time, the input's camera, a camera path."""
    from d2.cli import bars, stop
    from d2.recon.film import render as film

    with bars.progress(quiet or as_json) as progress, stop.StopFlag() as should_stop:
        made = film(
            source, path, out, format=format, size=_size(size), fps=fps, seconds=seconds, turns=turns, time=time,
            elevation_deg=elevation_deg, fov_deg=fov_deg, background=background, beside_input=beside_input,
            passes=[name for name in passes.split(",") if name], device=device, overwrite=overwrite,
            progress=progress, should_stop=should_stop,
        )  # fmt: skip
    if as_json:
        import json
        from dataclasses import asdict

        facts = asdict(made) | {"path": str(made.path), "passes": {k: str(v) for k, v in made.passes.items()}}
        typer.echo(json.dumps(facts))
    elif not quiet:
        typer.echo(f"{quoted(made.path)}: {made.frames} frames, {made.width}×{made.height}, {made.fps:g} a second")
        for what, target in made.passes.items():
            typer.echo(f"{what}: {quoted(target)}")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError as error:
        raise InputError(f"--size must be WxH or one number, got {text!r}") from error
