"""What tests look at: the bits of a run, what it told, and a way to stop it at a chosen moment."""

import signal

from d2 import fileio
from d2.phases import Observer


def bits(folder):
    """sha256 of every cell and of the cameras."""
    paths = [*sorted((folder / "images").rglob("*.png")), folder / "transforms.json"]
    return {path.relative_to(folder).as_posix(): fileio.sha256(path) for path in paths}


def stop_at(phase, done):
    """An observer and a should_stop that ask for the end once a phase is so far."""
    seen = []

    class Watch(Observer):
        def phase(self, name, at, total):
            if name == phase and at >= done:
                seen.append(name)

    return {"observer": Watch(), "should_stop": lambda: signal.SIGTERM if seen else 0}


class Told(Observer):
    def __init__(self):
        self.texts, self.phases = [], []

    def message(self, text):
        self.texts.append(text)

    def phase(self, name, done, total):
        self.phases.append((name, done, total))
