"""`d2 doctor`: what works on this machine, and what to do about what does not."""

from __future__ import annotations

import contextlib

import typer


def doctor(
    json: bool = typer.Option(False, help="Print one JSON object, with version and licence of every dependency."),
) -> None:
    """Show what works on this machine: torch, CUDA, rasterizer, video, optional extras, weights."""
    from d2 import machine

    checks = machine.checks()
    with contextlib.suppress(ImportError, OSError):  # without torch, which the checks above have told
        from d2 import pair

        checks += pair.checks()
    if json:
        import json as encoder

        record = {check.name: check._asdict() for check in checks}
        typer.echo(encoder.dumps(record | {"dependencies": machine.dependencies()}))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.ok else ("--" if check.optional else "NO")
        typer.echo(f"{mark}  {check.name:<{width}}  {check.detail}")
    if not all(check.ok or check.optional for check in checks):
        raise typer.Exit(4)
