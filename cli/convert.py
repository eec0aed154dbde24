"""`d2 convert`: one splat file to another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2.fileio import quoted


def convert(
    source: Annotated[Path, typer.Argument(help="A .ply, .spz or .splat file.", readable=False)],
    target: Annotated[
        Path, typer.Argument(help="The file to write: .ply, .spz, .splat, .glb or .usd.", readable=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Convert a splat file; the suffixes say from what to what."""
    from d2.recon import conversion

    conversion.convert(source, target, overwrite)
    if not quiet:
        typer.echo(f"{quoted(target)}: {target.stat().st_size} bytes")
