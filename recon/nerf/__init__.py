"""d2 inside nerfstudio: a dataparser that keeps time, the method `d2-4dgs`, and what converts between the two.

`dataparser`, `model` and `method` are loaded by nerfstudio alone, through the entry points of the wheel; the rest works
without it.
"""
