"""The viewer: a page without dependencies that plays a 4D asset, the code that fills it, a small server."""
