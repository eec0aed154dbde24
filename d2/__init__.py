"""d2: a picture, a video or a multi-view video becomes a 4D asset.

What the command line does, in Python; each returns what it made, and raises subclasses of d2.errors.D2Error:

    d2.generate(source, out)                  stage 1, d2 generate: pictures in, a run folder of views × frames out
    d2.recon.reconstruct(source, out)         stage 2, d2 reconstruct: that folder, or a dataset, to 4D Gaussians
    d2.recon.export(source, formats)          d2 export: files for other programs
    d2.recon.render(source, path, out)        d2 render: video or pictures along a camera path
    d2.recon.evaluate(models, truth)          d2 bench evaluate: measured on pictures it has not seen
    d2.recon.importers.bring.bring(path, out) d2 import: other tools' data as a run folder
    d2.adapters                               denoisers of your own, for d2.generate
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2.generation import generate

__all__ = ["__version__", "generate"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the entry point on first use, so that `import d2` stays free of torch."""
    if name == "generate":
        from d2.generation import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
