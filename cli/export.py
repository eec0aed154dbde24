"""`d2 export`: writes a reconstruction in the formats other programs open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from d2.errors import InputError
from d2.fileio import quoted

if TYPE_CHECKING:
    from typing import Literal

    from d2.recon.formats.frames import Frame


_FORMATS = (
    "ply, spz, splat, sog, glb, usd, usdz, usd-points, splatv, 4dgs, cameras, nerfstudio, mp4, contact, html, web;"
    " meshes with the same triangles in every frame: mesh-usd, mesh-glb (morph targets), mesh-abc (needs Blender),"
    " mesh-obj, mesh-ply; with triangles of their own in every frame: fused-usd, fused-obj, fused-ply"
)


def export(
    path: Annotated[
        Path, typer.Argument(help="A run folder, a reconstruction's folder or a gaussians.safetensors.", readable=False)
    ],
    formats: Annotated[str, typer.Option("--format", help=f"Comma list. {_FORMATS}.")] = "ply,mp4,contact",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write into; default: export/ beside the Gaussians.", readable=False)
    ] = None,
    time: Annotated[float | None, typer.Option(help="One moment, 0 to 1, instead of the whole clip.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; default: the run's.")] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames of the clip, or a part first:end of them (0:25); default: the run's.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What PLY files begin with; default: the run's name.")] = None,
    frame: Annotated[
        str,
        typer.Option(help="Axes of PLY files: rdf (the custom), rub (y up) or world (z up); or one frame's number."),
    ] = "rdf",
    up: Annotated[str | None, typer.Option(help="y or z, in all files; default: each format's custom.")] = None,
    height: Annotated[float | None, typer.Option(help="Metres: scales the asset to that height.")] = None,
    pivot: Annotated[str, typer.Option(help="The origin: none (as it is), ground (the feet) or center.")] = "none",
    forward: Annotated[str, typer.Option(help="Where the front looks with z up: -y, x, y or -x.")] = "-y",
    pad_sh3: Annotated[bool, typer.Option("--pad-sh3", help="Fill colour up to degree 3 (Houdini, Adobe).")] = False,
    prune_opacity: Annotated[float, typer.Option(help="Leave out what is fainter, 0 to 1; N then varies.")] = 0.0,
    size: Annotated[int, typer.Option(help="Width and height of the video in pixels.")] = 512,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Meshes: field=value; repeatable (fields: d2.recon.mesh.MeshConfig)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: format to path.")] = False,
) -> None:
    """Write a reconstruction in the formats other programs open: splats, USD, meshes, a page, a turntable video."""
    from d2.cli import bars
    from d2.config import load
    from d2.recon.exports import export as export_asset
    from d2.recon.mesh import MeshConfig
    from d2.recon.placement import Placement

    count, span = _frames(frames)
    if frame.isdecimal():
        if time is not None or span is not None:
            raise InputError(f"--frame {frame} is one moment; leave --time and --frames out")
        span, frame = (int(frame), int(frame) + 1), "rdf"

    with bars.progress(quiet or as_json) as progress:
        written = export_asset(
            path, formats.split(","), out, fps=fps, frames=count, span=span, time=time, name=name,
            overwrite=overwrite, up=cast('Literal["y", "z"] | None', up),
            placement=Placement(height, pivot, forward), frame=cast("Frame", frame), pad_sh3=pad_sh3,
            prune_opacity=prune_opacity, size=size, meshing=load(MeshConfig, sets=tuple(sets or ())),
            progress=progress,
        )  # fmt: skip
    if as_json:
        import json

        typer.echo(json.dumps({what: str(target) for what, target in written.items()}))
    elif not quiet:
        for what, target in written.items():
            typer.echo(f"{what}: {quoted(target)}")


def _frames(text: str | None) -> tuple[int | None, tuple[int, int] | None]:
    """What --frames says: how many, or which part of them."""
    if text is None:
        return None, None
    first, colon, end = text.partition(":")
    try:
        return (None, (int(first or 0), int(end))) if colon else (int(text), None)
    except ValueError as error:
        raise InputError(f"--frames must be a number or first:end, got {text!r}") from error
