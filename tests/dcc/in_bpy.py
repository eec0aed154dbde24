"""Runs inside Blender: imports files as a user would and writes down what it sees. JOB.json -> OUT.npz"""

import importlib
import json
import sys

import numpy as np


def main(job: str, out: str) -> None:
    bpy = importlib.import_module("bpy")
    importers = {
        "usd": bpy.ops.wm.usd_import, "glb": bpy.ops.import_scene.gltf, "abc": bpy.ops.wm.alembic_import,
        "obj": bpy.ops.wm.obj_import, "ply": bpy.ops.wm.ply_import,
    }  # fmt: skip
    found = {}
    with open(job, encoding="utf-8") as file:
        tasks = json.load(file)
    for name, (path, fps, frames) in tasks.items():
        bpy.ops.wm.read_factory_settings(use_empty=True)
        scene = bpy.context.scene
        scene.render.fps = fps
        importers[path.rsplit(".", 1)[1]](filepath=path)
        (thing,) = [each for each in scene.objects if each.type == "MESH"]
        for frame in frames:
            scene.frame_set(frame)
            for what, array in read(bpy, thing).items():
                found[f"{name}/{frame}/{what}"] = array
    np.savez(out, **found)


def read(bpy, thing) -> dict[str, np.ndarray]:
    """World positions, triangles' corners and the attributes of one value or three a point."""
    evaluated = thing.evaluated_get(bpy.context.evaluated_depsgraph_get())
    mesh = evaluated.to_mesh()
    world = np.array(evaluated.matrix_world)
    places = values(mesh.vertices, "co", 3)
    found = {"points": places @ world[:3, :3].T + world[:3, 3]}
    found["corners"] = values(mesh.loops, "vertex_index", 1)
    for attribute in mesh.attributes:
        width = {"FLOAT": ("value", 1), "FLOAT_VECTOR": ("vector", 3), "FLOAT_COLOR": ("color", 4)}
        if attribute.domain == "POINT" and attribute.data_type in width and attribute.name != "position":
            found[attribute.name] = values(attribute.data, *width[attribute.data_type])
    evaluated.to_mesh_clear()
    return found


def values(collection, name: str, width: int) -> np.ndarray:
    array = np.empty(len(collection) * width, np.int32 if name == "vertex_index" else np.float32)
    collection.foreach_get(name, array)
    return array if width == 1 else array.reshape(-1, width)


if __name__ == "__main__":
    main(*sys.argv[-2:])
