"""`d2 import`: other tools' data becomes a run folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from d2.fileio import quoted

if TYPE_CHECKING:
    from d2.recon.importers.bring import Kind


def bring(
    path: Path = typer.Argument(
        help="Folder of SV4D or SV4D 2.0 videos (or one of them), of Consistent4D, of D-NeRF, Blender or nerfstudio, a"
        " COLMAP project (pinhole), videos with cameras.json, numbered 3DGS PLY files, or what ns-train d2-4dgs wrote.",
        readable=False,
    ),
    out: Path | None = typer.Option(None, help="Run folder to write; default: runs/<name>.", readable=False),
    kind: str | None = typer.Option(
        None,
        "--from",
        help="sv4d, consistent4d, transforms, colmap, videos, ply or d2-4dgs; default: told by the files.",
    ),
    fps: float | None = typer.Option(None, help="Frames a second; default: the data's own, or 24."),
    elevation_deg: float | None = typer.Option(
        None, help="SV4D, Consistent4D: elevation of the cameras, degrees; default: their scripts'."
    ),
    fov_deg: float | None = typer.Option(
        None, help="SV4D, Consistent4D: horizontal field of view, degrees; default: theirs."
    ),
    clockwise: bool = typer.Option(False, help="SV4D, Consistent4D: views go round clockwise, seen from above."),
    refit: bool = typer.Option(False, help="PLY: draw the files for d2 reconstruct to fit, even where they match."),
    quiet: bool = typer.Option(False, help="No progress."),
    json: bool = typer.Option(False, help="Print the result as one JSON object."),
) -> None:
    """Make a run folder of other tools' data.

    cameras.json, beside videos or folders of frames: {"fps": 24, "fov_deg": 33.8, "cameras": [{"file": "front.mp4",
    "azimuth_deg": 0, "elevation_deg": 10}, ...]}; instead of angles transform_matrix with fl_x, fl_y, cx, cy.
    """
    from d2.cli import report
    from d2.recon.importers.bring import bring as run

    with report.observer(quiet) as observer:
        result = run(
            path, out, cast("Kind | None", kind), fps=fps, elevation_deg=elevation_deg, fov_deg=fov_deg,
            clockwise=clockwise, refit=refit, message=observer.message, progress=observer.phase,
        )  # fmt: skip
    if json:
        import dataclasses
        import json as encoder

        typer.echo(encoder.dumps(dataclasses.asdict(result) | {"folder": str(result.folder)}))
        return
    what = f"{result.gaussians} Gaussians" if result.gaussians else f"{result.pictures} pictures"
    typer.echo(f"{quoted(result.folder)}: {what} from {result.kind}, {result.fps:g} frames a second")
    command = "export" if result.gaussians else "reconstruct"
    typer.echo(f"Next: d2 {command} {shlex.quote(str(result.folder))}")
