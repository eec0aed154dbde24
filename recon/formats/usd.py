"""OpenUSD: one animated ParticleField3DGaussianSplat, or points for programs that do not draw splats.

Velocity is constant, so linear interpolation between time samples is exact for positions at any sub-frame;
only positions, opacities and the extent are sampled.  Needs usd-core 26.3 or newer (extra `usd`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2 import fileio, machine
from d2.errors import SetupError
from d2.recon.cameras import Track
from d2.recon.formats import values
from d2.recon.formats.frames import FROM_WORLD, move
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import sh as spherical

Up = Literal["y", "z"]
FIRST_FRAME = 1  # the time code of the first sample, as PLY sequences count
_FRAMES = {"y": "rub", "z": "world"}
_EXTENT_SIGMAS = 3.0
_FILM = 0.36  # width of a camera's film, in tenths of a metre: 36 mm


def write(
    gaussians: Gaussians4D,
    path: str | Path,  # .usd, .usdc, .usda or .usdz
    times: Sequence[float] | np.ndarray,  # [F] in 0..1; one: a still
    fps: float,
    *,
    up: Up = "y",
    points: bool = False,
    name: str = "asset",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the clip as one file, whole or not at all; `points` writes UsdGeomPoints instead of splats.

    Units are metres.  Frame k of the clip stands at time code k + 1, at `fps` codes a second.  Raises SetupError
    without usd-core, InputError for an empty set, NumericalError for NaN or infinity.
    """
    stage = new_stage(len(times), fps, up)
    moved = move(gaussians, FROM_WORLD[_FRAMES[up]])
    prim = _define_points(stage, moved, name) if points else _define_splats(stage, moved, name)
    _animate(prim, moved, times, points, progress)
    save(stage, path, name)


def write_cameras(
    tracks: Sequence[Track],
    path: str | Path,  # .usd, .usdc or .usda
    times: np.ndarray,  # [F] in 0..1 of the clip
    fps: float,
    *,
    up: Up = "y",
) -> None:
    """Cameras on 36 mm of film in a scene of metres, whole or not at all; a moving one has a sample a frame.

    Frame k of the clip is time code k + 1, as in `write`.  Raises SetupError without usd-core.
    """
    pxr = modules()
    stage = new_stage(len(times), fps, up)
    root = define_root(stage, "cameras")
    for track in tracks:
        prim = pxr.UsdGeom.Camera.Define(stage, f"{root}/{track.name}")
        place = prim.AddTransformOp()
        moving = len(track.c2w) > 1
        for pose, K, time in zip(track.turned(FROM_WORLD[_FRAMES[up]]), track.Ks, track.times, strict=True):
            code = (
                FIRST_FRAME + float(np.interp(time, times, range(len(times)))) if moving else pxr.Usd.TimeCode.Default()
            )
            place.Set(pxr.Gf.Matrix4d(pose.T.tolist()), code)  # row vectors
            for attribute, value in _lens(prim, K, track.width, track.height).items():
                if attribute.Get(code) != value:
                    attribute.Set(value, code)
        away = float(np.linalg.norm(track.c2w[:, :3, 3], axis=1).max())
        prim.CreateClippingRangeAttr(pxr.Gf.Vec2f(0.001 * away, 100 * away))
    with fileio.atomic_path(path) as temporary:
        if not stage.GetRootLayer().Export(str(temporary)):
            raise OSError("usd-core could not write it")


def _lens(camera: Any, K: np.ndarray, width: int, height: int) -> dict[Any, float]:
    """Focal length and film of a pinhole; USD counts them in tenths of a unit, here of a metre."""
    pixel = _FILM / width  # width of one on the film
    focal = float(K[0, 0]) * pixel
    tall = focal * height / float(K[1, 1])
    return {
        camera.CreateFocalLengthAttr(): focal,
        camera.CreateHorizontalApertureAttr(): _FILM,
        camera.CreateVerticalApertureAttr(): tall,
        camera.CreateHorizontalApertureOffsetAttr(): (0.5 * width - float(K[0, 2])) * pixel,
        camera.CreateVerticalApertureOffsetAttr(): (float(K[1, 2]) - 0.5 * height) * tall / height,
    }


def modules() -> Any:
    """The modules of usd-core that are used here."""
    pxr = machine.require("pxr", "usd-core")
    for name in ("Usd", "UsdGeom", "UsdUtils", "UsdVol", "Gf", "Sdf", "Tf", "Vt"):
        machine.require(f"pxr.{name}", "usd-core")
    if not hasattr(pxr.UsdVol, "ParticleField3DGaussianSplat"):
        raise SetupError("this usd-core knows no splats; run: pip install 'usd-core>=26.3'")
    return pxr


def new_stage(frames: int, fps: float, up: Up) -> Any:
    """An empty stage in metres that plays `frames` frames."""
    pxr = modules()
    stage = pxr.Usd.Stage.CreateInMemory()
    pxr.UsdGeom.SetStageUpAxis(stage, up.upper())
    pxr.UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    stage.SetTimeCodesPerSecond(fps)
    stage.SetFramesPerSecond(fps)
    stage.SetStartTimeCode(FIRST_FRAME)
    stage.SetEndTimeCode(FIRST_FRAME + frames - 1)
    return stage


def define_root(stage: Any, name: str) -> str:
    """Defines the model's root and returns where geometry goes."""
    pxr = modules()
    root = pxr.UsdGeom.Xform.Define(stage, "/" + pxr.Tf.MakeValidIdentifier(name))
    stage.SetDefaultPrim(root.GetPrim())
    pxr.Usd.ModelAPI(root.GetPrim()).SetKind("component")
    return f"{root.GetPath()}"


def _define_splats(stage: Any, gaussians: Gaussians4D, name: str) -> Any:
    """The prim with everything that does not change; sampled attributes get their default later."""
    pxr = modules()
    v = values.of(gaussians.at(0.0))
    splat = pxr.UsdVol.ParticleField3DGaussianSplat.Define(stage, f"{define_root(stage, name)}/splats")
    splat.CreateOrientationsAttr(pxr.Vt.QuatfArray.FromNumpy(_f4(v.quats[:, [1, 2, 3, 0]])))
    splat.CreateScalesAttr(pxr.Vt.Vec3fArray.FromNumpy(_f4(v.scales)))
    splat.CreateRadianceSphericalHarmonicsDegreeAttr(spherical.degree_of(v.sh.shape[1]))
    coefficients = splat.CreateRadianceSphericalHarmonicsCoefficientsAttr(
        pxr.Vt.Vec3fArray.FromNumpy(_f4(v.sh.reshape(-1, 3)))
    )
    pxr.UsdGeom.Primvar(coefficients).SetElementSize(v.sh.shape[1])
    splat.CreateProjectionModeHintAttr("perspective")
    splat.CreateSortingModeHintAttr("zDepth")
    return splat


def _define_points(stage: Any, gaussians: Gaussians4D, name: str) -> Any:
    """Points as wide as two standard deviations, in their colour of degree 0, linear as displayColor is."""
    pxr = modules()
    v = values.of(gaussians.at(0.0))
    points = pxr.UsdGeom.Points.Define(stage, f"{define_root(stage, name)}/points")
    points.CreateWidthsAttr(pxr.Vt.FloatArray.FromNumpy(_f4(2 * np.exp(np.log(v.scales).mean(1)))))
    rgb = (0.5 + spherical.C0 * v.sh[:, 0]).clip(0, 1)
    color = points.CreateDisplayColorPrimvar(pxr.UsdGeom.Tokens.vertex)
    color.Set(pxr.Vt.Vec3fArray.FromNumpy(_f4(rgb**2.2)))
    points.CreateDisplayOpacityPrimvar(pxr.UsdGeom.Tokens.vertex)
    return points


def _animate(
    prim: Any,
    gaussians: Gaussians4D,
    times: Sequence[float] | np.ndarray,
    points: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Sets positions, opacities and extent: a default, and a sample a frame where there are several."""
    pxr = modules()
    where = prim.CreatePointsAttr() if points else prim.CreatePositionsAttr()
    opacity = prim.GetDisplayOpacityPrimvar().GetAttr() if points else prim.CreateOpacitiesAttr()
    extent = prim.CreateExtentAttr()
    for index, time in enumerate(times):
        v = values.of(gaussians.at(float(time)))
        reach = _EXTENT_SIGMAS * v.scales.max(1, keepdims=True)
        box = np.stack([(v.means - reach).min(0), (v.means + reach).max(0)])
        sampled = {
            where: pxr.Vt.Vec3fArray.FromNumpy(_f4(v.means)),
            opacity: pxr.Vt.FloatArray.FromNumpy(_f4(v.opacities)),
            extent: pxr.Vt.Vec3fArray.FromNumpy(_f4(box)),
        }
        for attribute, value in sampled.items():
            if index == 0:
                attribute.Set(value)
            if len(times) > 1:
                attribute.Set(value, FIRST_FRAME + index)
        progress(index + 1, len(times))


def save(stage: Any, path: str | Path, name: str) -> None:
    """Writes a stage as one file, whole or not at all; a .usdz holds it under `name`."""
    with fileio.atomic_path(path) as temporary:
        if temporary.suffix == ".usdz":
            _package(stage, temporary, name)
        elif not stage.GetRootLayer().Export(str(temporary)):
            raise OSError("usd-core could not write it")


def _package(stage: Any, temporary: Path, name: str) -> None:
    """A .usdz: usd-core wants the crate as a file, which goes again."""
    pxr = modules()
    crate = temporary.with_name(f"{temporary.stem}.usdc")
    try:
        if not stage.GetRootLayer().Export(str(crate)):
            raise OSError("usd-core could not write it")
        writer = pxr.Sdf.ZipFileWriter.CreateNew(str(temporary))
        with writer:
            writer.AddFile(str(crate), f"{pxr.Tf.MakeValidIdentifier(name)}.usdc")
    finally:
        fileio.remove(crate)


def _f4(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
