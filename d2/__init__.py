"""d2: an image, a single-view video or a static 3D asset becomes a 4D asset."""

__version__ = "0.1.0"
