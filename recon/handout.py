"""README.txt of an export folder: what each file is, in which axes and how fast, and how programs open it."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING

from d2 import __version__
from d2.recon import drawing
from d2.recon.formats import sequence

if TYPE_CHECKING:
    from d2.recon.exports import Clip

FILE = "README.txt"
MARK = "Written by d2 "  # how one begins; another is never replaced
BLENDER = "import_in_blender.py"
_AXES = {
    "rdf": "x right, y down, z forward",
    "rub": "y up, x right, z towards the viewer",
    "world": "z up, x right, the viewer on -y",
}
# What programs do with a format; {first}, {numbered}, {file} and {frames} are filled in.
_OPEN = {
    "ply": [
        "Blender 4.2 or newer: Scripting workspace, Open, {blender}, Run Script: the whole clip, animated.",
        "Blender, one frame: File > Import > Stanford PLY ({first}): points with every attribute.",
        "Houdini: a File SOP on {houdini} reads points with every attribute; the GSOPs plug-in draws them.",
        "Unity: the UnityGaussianSplatting package makes an asset of one file, as {first}.",
        "Unreal: through a plug-in that reads 3DGS PLY, one file at a time, as {first}.",
        "Nuke 17: draws splats from USD: d2 export --format usd.",
        "SuperSplat: drop the files {numbered} onto the page together; it plays them as a sequence.",
    ],
    "spz": [
        "Unity: the UnityGaussianSplatting package makes an asset of one file, as {first}.",
        "SuperSplat: drop {first} onto the page.",
        "Blender, Houdini, Unreal, Nuke: take d2 export --format ply or usd.",
    ],
    "splat": [
        "SuperSplat and web viewers: drop {first} onto the page.",
        "Blender, Houdini, Unreal, Unity, Nuke: take d2 export --format ply or usd.",
    ],
    "sog": [
        "SuperSplat and PlayCanvas: drop {first} onto the page, or load it as an asset.",
        "Blender, Houdini, Unreal, Unity, Nuke: take d2 export --format ply or usd.",
    ],
    "glb": [
        "Engines with KHR_gaussian_splatting (PlayCanvas is one) draw splats from {first}.",
        "Any other program that reads glTF, Blender too, shows coloured points.",
        "Houdini, Unreal, Unity, Nuke, SuperSplat: take d2 export --format ply or usd.",
    ],
    "usd": [
        "Nuke 17: GeoImport {file}, then SplatRender.",
        "Houdini: Solaris, a Reference or Sublayer LOP on {file}; drawn by renderers that know the splat prim.",
        "Blender skips splats in USD: take d2 export --format ply (with its script) or usd-points.",
        "Unreal, Unity, SuperSplat: take d2 export --format ply.",
    ],
    "usd-points": [
        "Blender: File > Import > Universal Scene Description ({file}): points with colours that move.",
        "Houdini: Solaris, a Reference LOP on {file}.",
        "Nuke: take d2 export --format usd. Unreal, Unity, SuperSplat: --format ply.",
    ],
    "splatv": ["The splaTV page plays {file}: drop it there."],
    "4dgs": ["Python: fourdgs.read({file!r}); viewers of the 4dgs container."],
    "cameras": [
        "Blender: File > Import > USD (cameras/cameras.usda) or glTF 2.0 (cameras/cameras.glb).",
        "Houdini: Solaris, a Reference LOP on cameras/cameras.usda.",
        "Nuke: a Camera node reads cameras/cameras.usda.",
        "Unreal: the USD Stage window opens cameras/cameras.usda. Unity: a glTF importer, cameras/cameras.glb.",
        "The camera called input is the one that the input was seen from.",
    ],
}
_OPEN["usdz"] = _OPEN["usd"]
FORMATS = tuple(_OPEN)


def text(formats: list[str], clip: Clip) -> str:
    """What a README.txt says about these formats of a clip."""
    parts = [f"{MARK}{__version__}: {clip.name}", "", *_facts(clip)]
    for what in formats:
        parts += ["", f"{what}: {_where(what, clip)}"]
        names = _names(what, clip)
        parts += [f"  {line.format(**names)}" for line in _OPEN[what] if "{blender}" not in line or not clip.still]
    return "\n".join(parts) + "\n"


def beside(what: str, clip: Clip) -> dict[str, bytes]:
    """What stands beside the files of a sequence, by name."""
    files = {FILE: text([what], clip).encode()}
    if what == "ply":
        script = importlib.resources.files("d2.recon.formats").joinpath(f"{BLENDER}.txt").read_text("utf-8")
        files[BLENDER] = script.replace("@AXES@", clip.layout.frame).encode()
    return files


def _facts(clip: Clip) -> list[str]:
    low, high = drawing.bounds(clip.gaussians, clip.times)
    count = len(clip.times)
    lasts = "one moment" if clip.still else f"{count} frames at {clip.fps:g} a second ({count / clip.fps:.2f} s)"
    return [f"{len(clip.gaussians)} Gaussians, {lasts}, {high[2] - low[2]:.3f} high (metres where a unit is one)."]


def _where(what: str, clip: Clip) -> str:
    """The files of a format and the axes they are in."""
    custom = {"ply": clip.layout.frame, "splat": clip.frame or clip.layout.frame, "sog": clip.layout.frame}
    custom |= {"splatv": clip.frame or "rdf", "glb": "rub"}
    axes = _AXES[custom.get(what, clip.frame or "rub")]
    if what == "cameras":
        return f"cameras/cameras.usda ({axes}), cameras/cameras.glb ({_AXES['rub']})"
    names = _names(what, clip)
    return f"{names['file'] if clip.still or 'first' not in names else names['numbered']} ({axes})"


def _names(what: str, clip: Clip) -> dict[str, str]:
    """The files of a format as a reader finds them from the README's own folder."""
    from d2.recon.exports import MOMENTS, file_name

    names = {"file": file_name(what, clip), "blender": BLENDER}
    if what not in MOMENTS:
        return names
    if clip.still:
        return names | {"first": names["file"], "numbered": names["file"], "houdini": names["file"]}
    count = len(clip.times)
    first, last = (sequence.file_name(clip.name, f".{what}", k, count) for k in (0, count - 1))
    digits = max(4, len(str(count)))
    return names | {"first": first, "numbered": f"{first} to {last}", "houdini": f"{clip.name}_$F{digits}.{what}"}
