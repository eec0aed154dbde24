"""`d2 view`: the asset in a browser, as a file of its own or served while the fit goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2.fileio import quoted


def view(
    path: Annotated[
        Path, typer.Argument(help="A run folder, a reconstruction's folder, its Gaussians, or a page.", readable=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; default: export/ beside the Gaussians.", readable=False)
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it here, following a fit that still runs.")] = False,
    port: Annotated[int | None, typer.Option(help="To serve on; default: the first free one from 8417 on.")] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
) -> None:
    """Look at a reconstruction in a browser.

    Writes one HTML file that plays anywhere, without a network, and opens it.  With --serve the page shows the
    newest model of a fit that is still running; only this machine can reach it.
    """
    if serve:
        _serve(path, port, open_page)
        return
    if path.suffix == ".html" and path.is_file():
        page = path
    else:
        from d2.recon.exports import export

        page = export(path, ["html"], out, overwrite=True)["html"]
    typer.echo(f"html: {quoted(page)}")
    if open_page:
        _open(page.absolute().as_uri())


def _serve(path: Path, port: int | None, open_page: bool) -> None:
    from d2.recon.viewer import live, serve

    server = serve.open_server(serve.answers_of(live.Live(live.find(path))), port)
    typer.echo(f"{server.url} (this machine only; Ctrl-C ends it)")
    if open_page:
        _open(server.url)
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()


def _open(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        typer.echo("No browser was found here; open the address above in one.", err=True)
