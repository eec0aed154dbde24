"""Runs inside Blender, without the rest of d2: reads a USD file and writes it as Alembic, frame for frame."""

from __future__ import annotations

import importlib
import sys


def convert(source: str, target: str, frames: str, fps: str) -> None:
    """`frames` and `fps` are numbers, the frames count from 1."""
    bpy = importlib.import_module("bpy")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.wm.usd_import(filepath=source)
    render = bpy.context.scene.render
    render.fps = max(1, round(float(fps)))
    render.fps_base = render.fps / float(fps)
    done = bpy.ops.wm.alembic_export(filepath=target, start=1, end=int(frames), flatten=True)
    if done != {"FINISHED"}:
        raise RuntimeError("Blender did not finish")


if __name__ == "__main__":
    convert(*(sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:]))
