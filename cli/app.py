"""The `d2` command: its subcommands, and the one border where errors become a line and an exit code."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import tempfile
import traceback

import typer

from d2 import __version__
from d2.cli import (
    batch,
    bench,
    bring,
    convert,
    doctor,
    export,
    generate,
    info,
    reconstruct,
    render,
    run,
    streams,
    train,
    view,
)
from d2.errors import D2Error, is_out_of_memory
from d2.fileio import quoted

EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EFBIG)

app = typer.Typer(
    name="d2",
    help="Picture, video or multi-view video in, 4D asset out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run.run)
app.command()(generate.generate)
app.command()(reconstruct.reconstruct)
app.command()(batch.batch)
app.command("import")(bring.bring)
app.command()(export.export)
app.command()(render.render)
app.command()(view.view)
app.command()(convert.convert)
app.command()(info.info)
app.add_typer(bench.app, name="bench")
app.command()(train.train)
app.command()(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Print the traceback of an error."),
) -> None:
    """Picture, video or multi-view video in, 4D asset out."""
    if version:
        typer.echo(f"d2 {__version__}")
        raise typer.Exit()


def main() -> None:
    """Runs the command line; what escapes a command ends here."""
    atexit.register(gc.freeze)  # or the end goes through all that torch holds in search of cycles, for most of a second
    streams.prepare()
    try:
        os.getcwd()
    except OSError:  # some libraries end the process when they cannot find themselves from here
        _fail("error: the working folder is gone; change to one that exists", 3)
    try:
        app()
    except D2Error as error:
        _fail(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if is_out_of_memory(error):
            _fail(f"error: out of memory: {str(error) or 'use a smaller --set size or fewer Gaussians'}", 5)
        if isinstance(error, OSError) and error.filename is not None:  # such as a name that is too long, or a disk
            reason = (error.strerror or str(error)).lower()
            _fail(f"error: cannot use {quoted(error.filename)}: {reason}", 5 if error.errno in EXHAUSTED else 3)
        _fail(f"internal error: {type(error).__name__}: {error} (details in {_log_traceback()})", 1)


def _fail(line: str, code: int) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(code)


def _log_traceback() -> str:
    from d2 import fileio

    try:
        path = os.path.join(tempfile.mkdtemp(prefix="d2-"), "error.log")  # a folder of the user's own: it quotes values
        fileio.atomic_write(path, traceback.format_exc().encode(errors="backslashreplace"))
        return path
    except (D2Error, OSError):
        return "no log: the disk refused; repeat with --debug"


if __name__ == "__main__":
    main()
