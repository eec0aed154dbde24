"""`bring`: other tools' data in, a run folder out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from d2 import destination, fileio
from d2.errors import ConflictError, InputError
from d2.recon.gaussians import Gaussians4D
from d2.recon.importers import colmap, pictures, splats, transforms, videos
from d2.recon.importers.pictures import Loose, Matrix
from d2.recon.nerf.checkpoints import import_checkpoint, is_checkpoint
from d2.recon.pipeline import MODEL
from d2.run import Run, is_run

Kind = Literal["sv4d", "consistent4d", "transforms", "colmap", "videos", "ply", "d2-4dgs"]
DEFAULT_FPS = 24.0
LEAST_SPACE = 16 * fileio.MB


@dataclass(frozen=True)
class Imported:
    """What came in."""

    folder: Path  # the run
    kind: Kind
    pictures: int  # 0 where Gaussians came
    gaussians: int  # 0 where pictures came
    fps: float


def bring(
    path: str | Path,
    out: str | Path | None = None,
    kind: Kind | None = None,
    *,
    fps: float | None = None,
    elevation_deg: float | None = None,
    fov_deg: float | None = None,
    clockwise: bool = False,
    refit: bool = False,
    message: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Imported:
    """Makes a run folder of another tool's data, for `reconstruct` and, where Gaussians came, `export`.

    `kind` is by default told by what lies in `path`: SV4D's videos, Consistent4D's folders, transforms.json
    (D-NeRF, Blender, nerfstudio), a COLMAP project, videos with cameras.json, a 3DGS PLY sequence, or what
    nerfstudio's method d2-4dgs trained.  The sequence becomes 4D Gaussians where its files hold the same ones, in
    whatever order and but for a few; else, and with `refit`, it is drawn from all sides for `reconstruct` to fit.
    `elevation_deg`, `fov_deg` and `clockwise` are of SV4D and Consistent4D, whose files name no cameras.  `out` is by
    default runs/<name>.  Raises InputError for what cannot be read and
    ConflictError for a folder in use; nothing of `path` is changed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{fileio.quoted(path)} does not exist")
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"--from {kind!r}: expected one of {', '.join(get_args(Kind))}")
    for name, value, low, high in (("fps", fps, 0, 1000), ("fov_deg", fov_deg, 0, 179)):
        if value is not None and not low < value <= high:
            raise InputError(f"{name} must be in {low}..{high}, got {value}")
    if elevation_deg is not None and not -90 <= elevation_deg <= 90:
        raise InputError(f"elevation_deg must be in -90..90, got {elevation_deg}")
    kind = kind or detect(path)
    home = (
        Path(out)
        if out is not None
        else Path("runs") / (path.resolve().stem if path.is_file() else path.resolve().name)
    )
    _require_place(home, path)
    message(f"Reading {fileio.quoted(path)} as {kind}")
    if kind == "d2-4dgs":
        model, metadata = Gaussians4D.load_with_metadata(import_checkpoint(path, home) / MODEL)
        return Imported(home, kind, 0, len(model), float(metadata.get("fps", DEFAULT_FPS)))
    found: Matrix | Loose
    match kind:
        case "ply":
            sequence = splats.read(path, progress)
            model = None if refit else splats.matched(sequence)
            if model is not None:
                return _write_model(home, model, len(sequence.times), fps or sequence.fps or DEFAULT_FPS)
            why = "" if refit else "The files do not hold the same Gaussians: "
            message(f"{why}drawing them from {splats.DRAWN_VIEWS} sides, to be fitted by d2 reconstruct")
            found = splats.drawn(sequence)
        case "sv4d":
            found = videos.sv4d(path, elevation_deg, fov_deg, clockwise)
        case "consistent4d":
            found = videos.consistent4d(path, elevation_deg, fov_deg, clockwise)
        case "videos":
            found = videos.with_cameras(path)
        case "colmap":
            found = colmap.read(path)
        case "transforms":
            found = transforms.read(path)
    rate = fps or found.fps or DEFAULT_FPS
    run = _begin(home, rate)
    with run.lock():
        run.manifest["fps"] = rate  # an interrupted import may have begun with another one
        run.remove_leftovers()
        source = {"imported": {"kind": kind, "name": path.resolve().name}}
        pictures.write(run, type(found)(**(vars(found) | {"record": source | found.record})), progress)
    stage = run.stage(pictures.MATRIX) or run.stage(pictures.LOOSE) or {}
    return Imported(home, kind, len(stage["files"]), 0, rate)


def detect(path: Path) -> Kind:
    """Which tool's data lies there. Raises InputError, naming what is known, where none does."""
    if is_checkpoint(path):
        return "d2-4dgs"
    if not path.is_dir():
        if videos.SV4D_VIEW.fullmatch(path.name):
            return "sv4d"
        raise InputError(
            f"{fileio.quoted(path)} is a file; expected a folder, a video of SV4D's, or a step-*.safetensors of d2-4dgs"
        )
    names = {entry.name for entry in path.iterdir()}
    if videos.CAMERAS in names:
        return "videos"
    if any(videos.SV4D_VIEW.fullmatch(name) for name in names):
        return "sv4d"
    if names & {"transforms.json", "transforms_train.json"}:
        return "transforms"
    if names & videos.CONSISTENT4D.keys():
        return "consistent4d"
    if colmap.find_model(path) is not None:
        return "colmap"
    if any(name.lower().endswith(".ply") for name in names):
        return "ply"
    raise InputError(
        f"{fileio.quoted(path)}: nothing known is here; expected cameras.json with videos, SV4D's 000000_v001.mp4, "
        "transforms.json, eval_0 (Consistent4D), COLMAP's sparse/0, or .ply files"
    )


def _require_place(home: Path, source: Path) -> None:
    """Raises for a folder in use; one whose import was interrupted is none."""
    if home.resolve() == source.resolve():
        raise InputError(f"{fileio.quoted(source)} is not written to; choose another --out")
    if is_run(home):
        if Run.open(home).manifest["stages"]:
            raise ConflictError(f"{fileio.quoted(home)} is a run already; choose another --out")
    else:
        Run.require_free(home)
    destination.require_space(home, LEAST_SPACE)


def _begin(home: Path, fps: float) -> Run:
    return Run.open(home) if is_run(home) else Run.create(home, fps)


def _write_model(home: Path, model: Gaussians4D, frames: int, fps: float) -> Imported:
    run = _begin(home, fps)
    with run.lock():
        run.manifest["fps"] = fps
        run.remove_leftovers()
        folder = home / "recon" / "main"
        model.save(folder / MODEL, {"fps": f"{fps:g}", "frames": str(frames)})
        record = {"psnr": None, "iterations": 0, "gaussians": len(model), "imported": {"kind": "ply"}}
        run.commit_stage("reconstruct:main", record | {"files": {MODEL: fileio.sha256(folder / MODEL)}})
    return Imported(home, "ply", 0, len(model), fps)
