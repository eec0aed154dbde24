"""`export` finds the reconstruction, writes what was asked for, and never harms what is there."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from d2 import fileio, images
from d2.cli.export import export as command
from d2.errors import ConflictError, InputError, NumericalError
from d2.recon import drawing
from d2.recon.conversion import READERS
from d2.recon.exports import export, find
from d2.recon.formats import glb, ply, spz, usd_reader
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.placement import Placement, place
from d2.run import Run


@pytest.fixture
def gaussians() -> Gaussians4D:
    g, count = torch.Generator().manual_seed(0), 60
    return Gaussians4D(
        means=0.3 * torch.randn(count, 3, generator=g), velocities=0.2 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g), log_durations=torch.zeros(count),
        quats=torch.randn(count, 4, generator=g), log_scales=torch.randn(count, 3, generator=g) * 0.3 - 2.5,
        opacity_logits=torch.randn(count, generator=g) + 2, sh=torch.randn(count, 1, 3, generator=g),
    )  # fmt: skip


@pytest.fixture
def recon(tmp_path, gaussians) -> Path:
    """<tmp>/fox/recon/default with 3 frames at 12 a second, no run around it."""
    folder = tmp_path / "fox" / "recon" / "default"
    gaussians.save(folder / "gaussians.safetensors", {"fps": "12", "frames": "3"})
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): fileio.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def decoded(video: Path) -> tuple[np.ndarray, float]:
    """uint8 frames [n, 64, 64, 3] of a video of that size, and how many a second."""
    call = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(call, capture_output=True, check=True, timeout=60)
    rate = re.search(rb"([\d.]+) fps", done.stderr)
    assert rate is not None
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 64, 64, 3), float(rate[1])


def test_everything_is_written_beside_the_gaussians_with_their_own_rate_and_length(recon, gaussians):
    calls = []
    written = export(recon, size=64, progress=lambda *call: calls.append(call))
    folder = recon / "export"
    assert written == {
        "ply": folder / "ply", "mp4": folder / "turntable.mp4", "contact": folder / "contact.png",
    }  # fmt: skip
    names = [
        "contact.png",
        "ply/README.txt",
        "ply/fox_0001.ply",
        "ply/fox_0002.ply",
        "ply/fox_0003.ply",
        "ply/frames.json",
        "ply/import_in_blender.py",
    ]
    assert list(contents(folder)) == [*names, "turntable.mp4"]
    manifest = json.loads((folder / "ply/frames.json").read_text())
    assert manifest["fps"] == 12 and [entry["time"] for entry in manifest["frames"]] == [0, 0.5, 1]
    middle = ply.read(folder / "ply/fox_0002.ply")
    torch.testing.assert_close(middle.means, gaussians.at(0.5).means, atol=1e-6, rtol=0)
    frames, rate = decoded(folder / "turntable.mp4")
    assert len(frames) == 48 and rate == 12  # 16 plays of 3 frames: 4 seconds
    assert images.read_rgba(folder / "contact.png")[0].shape == (20 + 4 * 160, 44 + 3 * 160, 4)
    assert {call[0] for call in calls} == set(written)
    assert ("ply", 3, 3) in calls and ("mp4", 48, 48) in calls and ("contact", 12, 12) in calls


@pytest.mark.parametrize("relative", ["recon/default/gaussians.safetensors", "recon/default", "."])
def test_a_file_its_folder_and_the_folder_of_its_only_reconstruction_all_name_it(recon, relative):
    assert export(recon.parents[1] / relative, ["ply"])["ply"] == recon / "export" / "ply"


def test_a_file_named_relative_to_the_working_folder_is_found(recon, monkeypatch):
    monkeypatch.chdir(recon)
    written = export("gaussians.safetensors", ["ply"])["ply"]
    assert written.is_dir() and (recon / "export/ply/fox_0001.ply").is_file()


def test_a_run_names_its_newest_reconstruction_and_its_own_rate_and_length(tmp_path, gaussians):
    run = Run.create(tmp_path / "run", fps=10)
    run.commit_stage("generate", {"views": 2, "frames": 4})
    for name in ("a", "b", "c"):
        gaussians.save(run.folder / "recon" / name / "gaussians.safetensors", {"fps": "7", "frames": "9"})
    for name in ("b", "a"):
        run.commit_stage(f"reconstruct:{name}", {})
    found = find(run.folder)
    assert found.folder == run.folder / "recon/a" and found.name == "run"
    assert (found.fps, found.frames) == (10, 4)
    run.drop_stage("reconstruct:b")
    run.commit_stage("reconstruct:b", {})
    assert find(run.folder).folder == run.folder / "recon/b"
    assert find(run.folder / "recon/c").frames == 4


def test_a_file_without_metadata_plays_25_frames_at_24(tmp_path, gaussians):
    gaussians.save(tmp_path / "gaussians.safetensors")
    found = find(tmp_path)
    assert (found.fps, found.frames) == (24, 25)


def test_arguments_come_before_what_the_file_says(recon, tmp_path):
    written = export(recon, ["ply"], tmp_path / "out", fps=30, frames=2, name="hero", frame="rub", pad_sh3=True)
    assert sorted(contents(written["ply"])) == [
        "README.txt", "frames.json", "hero_0001.ply", "hero_0002.ply", "import_in_blender.py",
    ]  # fmt: skip
    manifest = json.loads((written["ply"] / "frames.json").read_text())
    assert manifest["fps"] == 30 and len(manifest["frames"]) == 2
    head = (written["ply"] / "hero_0001.ply").read_bytes()[:3000]
    assert b"comment frame rub" in head and b"f_rest_44" in head


def test_one_moment_is_one_ply_and_a_turntable_at_rest(recon, gaussians):
    written = export(recon, ["ply", "contact"], time=0.25)
    assert written["ply"] == recon / "export" / "fox.ply"
    torch.testing.assert_close(ply.read(written["ply"]).means, gaussians.at(0.25).means, atol=1e-6, rtol=0)
    assert images.read_rgba(written["contact"])[0].shape == (20 + 4 * 160, 44 + 160, 4)


def test_gaussians_in_memory_need_a_folder_to_go_to(gaussians, tmp_path):
    written = export(gaussians, ["ply"], tmp_path / "new" / "out", frames=2)
    assert (written["ply"] / "asset_0002.ply").is_file()
    with pytest.raises(InputError, match="pass out="):
        export(gaussians, ["ply"])
    with pytest.raises(InputError, match="there are no Gaussians"):
        export(gaussians.map(lambda tensor: tensor[:0]), ["mp4"], tmp_path)


@pytest.mark.row(67)
def test_existing_outputs_are_a_conflict_and_stay_until_replaced(recon):
    folder = recon / "export"
    export(recon, ["ply", "contact"])
    before = contents(folder)
    with pytest.raises(ConflictError, match=r"contact\.png exists; pass --overwrite"):
        export(recon, ["mp4", "contact"])
    with pytest.raises(ConflictError, match="ply exists; pass --overwrite"):
        export(recon, ["mp4", "ply"])
    assert contents(folder) == before
    export(recon, ["ply", "contact"], frames=2, overwrite=True)
    assert "ply/fox_0003.ply" not in contents(folder) and contents(folder)["contact.png"] != before["contact.png"]


@pytest.mark.row(67)
def test_a_failure_with_overwrite_keeps_the_old_outputs(recon, monkeypatch):
    export(recon, size=32)
    before = contents(recon)

    def fail(*arguments, **options):
        raise NumericalError("injected")

    monkeypatch.setattr("d2.recon.formats.ply.encode", fail)
    monkeypatch.setattr("d2.recon.drawing.rasterize", fail)
    for what in ("ply", "mp4", "contact"):
        with pytest.raises(NumericalError, match="injected"):
            export(recon, [what], overwrite=True, size=32)
    assert contents(recon) == before


@pytest.mark.row(67)
def test_wrong_requests_are_refused_before_anything_is_written(recon, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / "contact.png").mkdir(parents=True)
    known = "known: ply, spz, splat, sog, glb, usd, usdz, usd-points, cameras, splatv, 4dgs, nerfstudio, mp4, contact"
    cases = [
        ({"formats": ["xyz"]}, known), ({"formats": []}, known), ({"formats": ["ply", ""]}, known),
        ({"out": "-"}, "must be a folder"), ({"out": ""}, "must be a folder"),
        ({"out": tmp_path / "file" / "below"}, "is a file"), ({"out": tmp_path / "file"}, "is a file"),
        ({"out": tmp_path / "taken"}, "is a folder"),
        ({"fps": 0}, "fps"), ({"fps": math.nan}, "fps"), ({"frames": 0}, "frames"), ({"time": 1.5}, "time"),
        ({"size": 1}, "size"), ({"frame": "xyz"}, "frame"), ({"prune_opacity": -1}, "prune_opacity"),
        ({"name": "../x"}, "file name"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            export(recon, **options)
    assert list(contents(recon)) == ["gaussians.safetensors"] and not list((tmp_path / "taken/contact.png").iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(recon, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot be written to; choose another --out"):
        export(recon)


def test_what_is_no_reconstruction_is_refused_with_the_reason(tmp_path, gaussians):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    unfinished = Run.create(tmp_path / "run")
    for path, error, message in (
        (tmp_path / "none", InputError, "does not exist"),
        (tmp_path / "a.txt", InputError, "neither a run folder"),
        (tmp_path / "empty", InputError, "neither a run folder"),
        (unfinished.folder, ConflictError, "d2 reconstruct"),
    ):
        with pytest.raises(error, match=message):
            export(path)
    for name in ("a", "b"):
        gaussians.save(unfinished.folder / "recon" / name / "gaussians.safetensors")
    with pytest.raises(InputError, match="holds 2 reconstructions; name one"):
        export(unfinished.folder)
    unfinished.commit_stage("reconstruct:../../elsewhere", {})
    with pytest.raises(InputError, match="leaves the folder"):
        export(unfinished.folder)


@pytest.mark.parametrize(
    "wrong", [{"fps": "fast"}, {"fps": "nan"}, {"frames": "0"}, {"fps": "-1"}, {"frames": "1e300"}]
)
def test_metadata_out_of_range_is_refused_by_name(tmp_path, gaussians, wrong):
    gaussians.save(tmp_path / "gaussians.safetensors", wrong)
    with pytest.raises(InputError, match=next(iter(wrong))):
        export(tmp_path)


def test_video_shows_the_object_on_white(recon):
    path = export(recon, ["mp4"], size=64, time=0.5, fps=2)["mp4"]
    frames, rate = decoded(path)
    assert rate == 2
    assert len(frames) == 8
    for frame in frames:
        assert frame[0, 0].min() > 245 and frame[28:36, 28:36].mean() < 240
    assert not np.array_equal(frames[0], frames[4])  # the camera turns though time stands


def test_command_prints_what_was_written(recon, tmp_path):
    app = typer.Typer()
    app.command()(command)
    run = CliRunner().invoke(app, [str(recon), "--format", "ply,contact", "--frames", "2"])
    assert run.exit_code == 0, run.output
    assert run.output.split("\n")[:2] == [f"ply: {recon}/export/ply", f"contact: {recon}/export/contact.png"]
    run = CliRunner().invoke(
        app, [str(recon), "--format", "ply", "--time", "1", "--out", str(tmp_path / "o"), "--json"]
    )
    assert json.loads(run.output) == {"ply": str(tmp_path / "o" / "fox.ply")}
    run = CliRunner().invoke(app, [str(recon), "--format", "contact", "--overwrite", "--quiet"])
    assert run.exit_code == 0 and run.output == ""
    run = CliRunner().invoke(app, [str(recon), "--format", "gif"])
    assert isinstance(run.exception, InputError)


def test_the_command_can_be_listed_without_torch():
    code = "import sys, d2.cli.export; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_contact_sheet_picks_at_most_six_columns(recon):
    path = export(recon, ["contact"], frames=25)["contact"]
    assert images.read_rgba(path)[0].shape[1] == 44 + 6 * 160


SPLATS = ["ply", "spz", "splat", "glb", "splatv"]


def test_every_splat_format_is_a_numbered_folder_or_one_file(recon):
    written = export(recon, SPLATS, fps=10)
    assert written["splatv"].name == "fox.splatv"
    for what in ("spz", "splat", "glb"):
        assert sorted(contents(written[what])) == [
            "README.txt",
            *(f"fox_000{k}.{what}" for k in (1, 2, 3)),
            "frames.json",
        ]
        assert json.loads((written[what] / "frames.json").read_text())["fps"] == 10
    still = export(recon, ["spz", "glb"], recon / "still", time=0.5)
    assert sorted(contents(recon / "still")) == ["README.txt", "fox.glb", "fox.spz"]
    assert sorted(path.name for path in still.values()) == ["fox.glb", "fox.spz"]


def test_a_span_writes_those_frames_of_the_clip(recon):
    written = export(recon, ["ply"], frames=5, span=(1, 3))
    manifest = json.loads((written["ply"] / "frames.json").read_text())
    assert [entry["time"] for entry in manifest["frames"]] == [0.25, 0.5]
    with pytest.raises(InputError, match="not in the clip"):
        export(recon, ["ply"], span=(0, 4), overwrite=True)
    with pytest.raises(InputError, match="first:end"):
        export(recon, ["ply"], span=(2, 2), overwrite=True)


def test_placement_is_the_same_in_every_format(recon):
    placement = Placement(1.8, "ground", "x")
    written = export(recon, ["ply", "spz", "glb"], time=0.5, placement=placement)
    found = [ply.read(written["ply"]), spz.read(written["spz"]), glb.read(written["glb"])]
    for other in found[1:]:
        torch.testing.assert_close(other.means, found[0].means, atol=5e-4, rtol=0)
    placed, _ = place(Gaussians4D.load(recon / "gaussians.safetensors"), [0.5], placement)
    low, high = drawing.bounds(placed, [0.5])
    assert low[2] == pytest.approx(0, abs=1e-5) and high[2] == pytest.approx(1.8, abs=1e-4)
    before = Gaussians4D.load(recon / "gaussians.safetensors")
    ratio = placed.velocities.norm(dim=1) / before.velocities.norm(dim=1)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    torch.testing.assert_close(placed.velocities[:, 0] / ratio, -before.velocities[:, 1], atol=1e-5, rtol=0)


def test_up_rules_over_the_custom_of_each_format(recon, gaussians):
    written = export(recon, ["ply", "spz"], time=0.0, up="z")
    for file, read in ((written["ply"], ply.read), (written["spz"], spz.read)):
        torch.testing.assert_close(read(file, "world").means, gaussians.at(0.0).means, atol=2e-4, rtol=0)


LEAST_DB = {"ply": 45, "glb": 45, "usd": 45, "spz": 38, "splat": 38}


@pytest.mark.parametrize("what", LEAST_DB)
def test_pictures_of_an_exported_frame_agree_with_the_moving_source(recon, gaussians, what):
    if what == "usd":
        pytest.importorskip("pxr", reason="usd-core is not installed: pip install -e '.[usd]'")
    path = export(recon, [what])[what]
    file = path if path.is_file() else path / f"fox_0002.{what}"
    found = usd_reader.read(file, 2) if what == "usd" else READERS[file.suffix](file)
    rig = drawing.orbit_rig(1.0, np.array([0.7]), 96, 96)

    def picture(shown: Gaussians3D | Gaussians4D) -> np.ndarray:
        (image,) = drawing.render_views(shown, rig.c2w, rig.K, 96, 96, [0.5], drawing.WHITE)
        return image[..., :3].clip(0, 1)

    error = np.mean((picture(found) - picture(gaussians)) ** 2)
    assert -10 * math.log10(max(error, 1e-12)) >= LEAST_DB[what]


@pytest.mark.parametrize(
    ("wrong", "name"), [((0, "none", "x"), "height"), ((1, "a", "x"), "pivot"), ((1, "none", "z"), "forward")]
)
def test_a_placement_out_of_range_is_refused(wrong, name):
    with pytest.raises(InputError, match=name):
        Placement(*wrong)


def test_command_takes_a_part_of_the_frames_and_a_height(recon):
    app = typer.Typer()
    app.command()(command)
    run = CliRunner().invoke(
        app, [str(recon), "--format", "spz", "--frames", "0:2", "--height", "1.8", "--pivot", "ground"]
    )
    assert run.exit_code == 0 and len(contents(recon / "export/spz")) == 4
    run = CliRunner().invoke(app, [str(recon), "--format", "spz", "--frames", "a:b"])
    assert isinstance(run.exception, InputError)


def test_what_a_killed_export_left_is_gone_after_the_next_and_nothing_of_others(recon):
    folder = recon / "export"
    export(recon, formats=("usd", "web"), size=64)
    whole = contents(folder)
    left = (".README.x5l5yt22.txt", ".fox.abcd_123.usd", "web/.index.abcd_123.html", "web/.asset.abcd_123.bin")
    others = (".README.txt.swp", "web/.htaccess")
    for name in (*left, *others):
        (folder / name).write_bytes(b"half")
    export(recon, formats=("usd", "web"), size=64, overwrite=True)
    assert contents(folder).keys() == whole.keys() | set(others)
