"""Runs in a Python of its own, without the rest of d2, for usd-core may end the process over a damaged file.

    python -P usd_arrays.py FILE [TIME_CODE]

Writes the arrays of the first splat prim to stdout, one .npy after another: positions, orientations (wxyz), scales,
opacities, spherical harmonics, then whether z is up, the first and the last time code and how many pass in a second.
Exits with 3 and one line where the file holds something else.
"""

from __future__ import annotations

import importlib
import io
import sys

import numpy as np


def main(path: str, frame: str = "") -> int:
    """0, or 3 where something is wrong with the file."""
    pxr = {name: importlib.import_module(f"pxr.{name}") for name in ("Tf", "Usd", "UsdGeom", "UsdVol")}
    buffer = io.BytesIO()
    try:
        with np.errstate(invalid="ignore"):  # what is not finite is told by the reader
            for array in arrays(pxr, path, frame):
                np.save(buffer, array)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 3
    except (pxr["Tf"].ErrorException, TypeError, ValueError, OverflowError):
        print("is not a readable USD file", file=sys.stderr)
        return 3
    sys.stdout.buffer.write(buffer.getvalue())
    return 0


def arrays(pxr: dict, path: str, frame: str) -> list[np.ndarray]:
    """What is written; raises LookupError where it is not there, and whatever usd-core and NumPy raise."""
    stage = pxr["Usd"].Stage.Open(path)
    kind = pxr["UsdVol"].ParticleField3DGaussianSplat
    splat = next((kind(prim) for prim in stage.Traverse() if prim.IsA(kind)), None)
    if splat is None:
        raise LookupError("holds no ParticleField3DGaussianSplat")
    start, end = stage.GetStartTimeCode(), stage.GetEndTimeCode()
    code = pxr["Usd"].TimeCode(float(frame) if frame else start)

    def of(attribute) -> np.ndarray:
        value = attribute.Get(code)
        if value is None:
            raise LookupError(f"{attribute.GetName()} holds no value")
        return np.array(value, np.float64)

    means, quats = of(splat.GetPositionsAttr()), of(splat.GetOrientationsAttr())
    if quats.shape != (len(means), 4):
        raise ValueError
    sh = of(splat.GetRadianceSphericalHarmonicsCoefficientsAttr()).reshape(len(means), -1, 3)
    up = str(pxr["UsdGeom"].GetStageUpAxis(stage)).lower() == "z"
    timing = np.array([up, start, end, stage.GetTimeCodesPerSecond()], np.float64)
    return [means, quats[:, [3, 0, 1, 2]], of(splat.GetScalesAttr()), of(splat.GetOpacitiesAttr()), sh, timing]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
