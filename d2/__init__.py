"""d2: a picture, a video or a multi-view video becomes a 4D asset."""

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
