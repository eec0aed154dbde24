"""Runs inside Blender, for meshes.py: imports an animated USD mesh as any user would and renders some of its frames.

PYTHON_WITH_BPY benchmarks/blender_picture.py JOB.json
"""

from __future__ import annotations

import importlib
import json
import sys

SAMPLES = 32  # paths a pixel


def main(path: str) -> None:
    bpy, matrix = importlib.import_module("bpy"), importlib.import_module("mathutils").Matrix
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.wm.usd_import(filepath=job["usd"])
    scene = bpy.context.scene
    mesh = next(thing for thing in scene.objects if thing.type == "MESH")
    mesh.data.materials.clear()
    mesh.data.materials.append(_material(bpy))
    for polygon in mesh.data.polygons:
        polygon.use_smooth = True
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(scene.camera)
    scene.camera.data.angle = job["fov"]
    lamp = bpy.data.objects.new("sun", bpy.data.lights.new("sun", "SUN"))
    lamp.data.energy, lamp.data.angle, lamp.rotation_euler = 2.5, 0.2, (0.7, -0.4, 0)
    scene.collection.objects.link(lamp)
    scene.world = bpy.data.worlds.new("world")
    scene.world.use_nodes = True
    scene.world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = 0.6
    render = scene.render
    render.engine, render.film_transparent = "CYCLES", True
    render.resolution_x = render.resolution_y = job["size"]
    scene.cycles.device, scene.cycles.samples, scene.cycles.max_bounces = "CPU", SAMPLES, 2
    scene.view_settings.view_transform = "Standard"
    for index, shot in enumerate(job["shots"]):
        scene.frame_set(shot["frame"])
        scene.camera.matrix_world = matrix(shot["c2w"])
        render.filepath = f"{job['out']}_{index}.png"
        bpy.ops.render.render(write_still=True)


def _material(bpy):
    """The vertex colours that came with the mesh."""
    material = bpy.data.materials.new("vertex colours")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    surface = nodes["Principled BSDF"]
    surface.inputs["Roughness"].default_value = 0.9
    color = nodes.new("ShaderNodeAttribute")
    color.attribute_name = "displayColor"
    links.new(color.outputs["Color"], surface.inputs["Base Color"])
    return material


if __name__ == "__main__":
    main(sys.argv[-1])
