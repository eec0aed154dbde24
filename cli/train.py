"""`d2 train`: a small view or frame model, or the autoencoder of both, on toys or on a user's own renders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from d2.fileio import quoted

MODEL = typer.Argument(help="vae first, then view and frame (in any order, or at the same time).")
DATA = typer.Option("toybox", help="toybox, or a folder of finished runs whose matrices are the data.")
OUT = typer.Option(Path("weights"), help="Folder of the training's state and of the checkpoints.", readable=False)
PRESET = typer.Option("tiny", help="Preset of d2 generate, or a YAML file of fields: what the models are.")
VAE_STEPS = 3000
STEPS = typer.Option(None, help=f"Gradient steps in all; default: {VAE_STEPS} for the vae, 20000.")
DEVICE = typer.Option("auto", help="auto, cpu, cuda or cuda:N.")
THREADS = typer.Option(None, help="CPU threads; one a model is best where both train at the same time.", min=1)
SETS = typer.Option([], "--set", help="field=value; repeatable (fields: d2.train.TrainConfig).")


def train(
    model: Literal["vae", "view", "frame"] = MODEL,
    data: str = DATA,
    out: Path = OUT,
    preset: str = PRESET,
    steps: int | None = STEPS,
    device: str = DEVICE,
    threads: int | None = THREADS,
    set: list[str] = SETS,
    quiet: bool = typer.Option(False, help="No progress."),
) -> None:
    """Train a small pair; goes on where the folder's state left off.

    d2 train vae, d2 train view, d2 train frame; then d2 generate INPUT --preset tiny --weights weights.
    """
    import torch

    from d2 import machine, publish, sequences
    from d2 import train as training
    from d2.cli import report, stop

    if threads is not None:
        torch.set_num_threads(threads)
    with report.observer(quiet) as observer, stop.StopFlag() as should_stop:
        settings = training.configure(preset, tuple(set) + ((f"steps={steps}",) if steps else ()))
        source = sequences.Toys(settings, "train") if data == "toybox" else sequences.Runs(settings, data)
        held_out = sequences.Toys(settings, "validation") if data == "toybox" else source
        if model == "vae":
            done = publish.train_vae(settings, source, out, steps or VAE_STEPS, progress=observer.phase)
        else:
            place = machine.choose_device(device)
            done = training.train(model, settings, source, held_out, out, place, observer, should_stop)
    typer.echo(f"{quoted(done)}: trained")
