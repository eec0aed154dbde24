"""`d2 info`: what is in a splat file or a reconstruction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2.fileio import quoted


def info(
    path: Annotated[
        Path, typer.Argument(help="A .ply, .spz, .splat, .glb or .usd file, or a reconstruction.", readable=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show counts, bounds, duration, colour degree and size."""
    from d2.recon import conversion

    facts = conversion.describe(path)
    if as_json:
        import json

        typer.echo(json.dumps(facts))
        return
    for name, value in (facts | {"file": quoted(facts["file"])}).items():
        typer.echo(f"{name}: {value}")
