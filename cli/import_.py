"""`d2 import`: what nerfstudio's method d2-4dgs trained, as a reconstruction in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    path: Annotated[Path, typer.Argument(help="What ns-train d2-4dgs wrote: its folder, or one step-*.safetensors.")],
    out: Annotated[Path, typer.Option(help="Run folder that takes the model, made where there is none.")],
    name: Annotated[str, typer.Option(help="What the reconstruction is called there.")] = "main",
) -> None:
    """Take a checkpoint of nerfstudio's d2-4dgs into a run folder."""
    from d2.recon.nerf.checkpoints import import_checkpoint

    folder = import_checkpoint(path, out, name)
    typer.echo(f"{folder}\nNext: d2 export {out} --format ply,mp4,contact")
