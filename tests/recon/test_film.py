"""`render` films the right moment from the right place, in files that other programs decode, and harms nothing."""

import json
import math
import re
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from faults.assertions import Outcome
from PIL import Image
from scenes import FRAMES, SIZE, VIEWS, moving_ball

from d2.cli import app
from d2.errors import ConflictError, InputError, SetupError, Stopped
from d2.recon import cameras, dataset, drawing, render, shots
from d2.recon.formats.exr import NOTHING
from d2.recon.sources import in_memory
from d2.recon.viewer import reference
from d2.run import Run

FPS = 12.0  # of the run


@pytest.fixture(scope="module")
def made(run_folder, tmp_path_factory) -> Path:
    """A run of the ball with a reconstruction that is the truth."""
    folder = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("film") / "ball"))
    home = folder / "recon" / "main"
    moving_ball().save(home / "gaussians.safetensors")
    data = dataset.load(folder)
    cameras.save(home, data)
    reference.save(home, data)
    Run.open(folder).commit_stage("reconstruct:main", {})
    return folder


def decoded(path: Path) -> np.ndarray:
    """float [n, H, W, 3] of a video."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]) / 255


def red_column(picture: np.ndarray) -> float:
    """Where what is red stands, in pixels from the left."""
    weight = np.clip(picture[..., 0] - picture[..., 1:3].max(-1), 0, None)
    weight = weight * picture[..., 3] if picture.shape[-1] == 4 else weight
    return float((weight.sum(0) * (np.arange(weight.shape[1]) + 0.5)).sum() / weight.sum())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


# -- the right moment from the right place -----------------------------------------------------------------


def test_the_input_camera_gives_back_the_plates_frame_by_frame(made, tmp_path):
    film = render(made, "input", tmp_path / "plates.mov", background="white")
    pictures, matrix = decoded(film.path), Run.open(made).matrix()
    assert (film.frames, film.fps, film.width, film.height) == (FRAMES, FPS, SIZE, SIZE)
    for k in range(FRAMES):
        plate = matrix.tensor([VIEWS - 1], [k])[0, 0].movedim(0, -1).numpy()
        assert psnr(pictures[k], plate) > 42
        others = [
            psnr(pictures[k], matrix.tensor([VIEWS - 1], [j])[0, 0].movedim(0, -1).numpy()) for j in range(FRAMES)
        ]
        assert int(np.argmax(others)) == k


def test_picture_k_shows_time_k(made, tmp_path):
    film = render(made, "input", tmp_path, format="png", size=(96, 96), fps=FPS * 2)
    frames = json.loads((film.path / "frames.json").read_text())["frames"]
    assert film.frames == 2 * FRAMES and [f["file"] for f in frames][:2] == ["input_0001.png", "input_0002.png"]
    times = np.array([f["time"] for f in frames])
    np.testing.assert_allclose(times, np.minimum(np.arange(8) / 2, FRAMES - 1) / (FRAMES - 1))
    columns = [red_column(np.asarray(Image.open(film.path / f["file"]), float)) for f in frames]
    # The red ball moves along x at constant speed, and the input camera looks along y.
    slope, offset = np.polyfit(times, columns, 1)
    assert slope > 30
    np.testing.assert_allclose(columns, offset + slope * times, atol=1.5)


def test_the_loop_has_no_seam(tmp_path):
    film = render(moving_ball(), "turntable", tmp_path / "a.mp4", size=(32, 32), seconds=0.5)
    pictures = decoded(film.path)
    steps = [np.abs(pictures[k] - pictures[k - 1]).mean() for k in range(len(pictures))]  # 0: from last to first
    assert len(pictures) == 12 and steps[0] < 1.5 * np.median(steps)


def test_what_a_killed_render_left_is_gone_after_the_next(tmp_path):
    left, other = tmp_path / ".a.abcd_123.mp4", tmp_path / ".b.abcd_123.mp4"
    left.write_bytes(b"half")
    other.write_bytes(b"half, of another")
    render(moving_ball(), "turntable", tmp_path / "a.mp4", size=(32, 32), seconds=0.1)
    assert not left.exists() and other.exists()


# -- what is in the files ----------------------------------------------------------------------------------


def truth(film, path: str, size: tuple[int, int], **wishes) -> list[drawing.Picture]:
    shot = shots.plan(path, in_memory(moving_ball()), shots.Wishes(size=size, **wishes))
    assert film.frames == len(shot.times)
    return list(drawing.draw(moving_ball(), shot.c2w, shot.Ks, *size, shot.times, depth=True))


def test_png_has_straight_alpha_and_passes_beside_it(tmp_path):
    wishes = {"seconds": 0.125, "time": 0.0}
    film = render(
        moving_ball(), "turntable", tmp_path, format="png", size=(41, 31), passes=["alpha", "depth"], **wishes
    )
    assert {p.name for p in tmp_path.iterdir()} == {"turntable_png", "turntable_alpha_png", "turntable_depth_png"}
    told = json.loads((film.passes["depth"] / "frames.json").read_text())
    assert (told["near"], told["far"]) == (film.near, film.far)
    for k, picture in enumerate(truth(film, "turntable", (41, 31), **wishes), 1):
        rgba = np.asarray(Image.open(film.path / f"turntable_{k:04d}.png"), float) / 255
        np.testing.assert_allclose(rgba[..., 3:], picture.alpha, atol=0.003)
        np.testing.assert_allclose(rgba[..., :3] * rgba[..., 3:], picture.color, atol=0.006)
        alpha = np.asarray(Image.open(film.passes["alpha"] / f"turntable_alpha_{k:04d}.png"))
        assert alpha.dtype == np.uint8 and alpha.shape == (31, 41)
        grey = np.asarray(Image.open(film.passes["depth"] / f"turntable_depth_{k:04d}.png"), float) / 65535
        solid, clear = picture.alpha[..., 0] > 0.6, picture.alpha[..., 0] < 0.4
        depth = film.near + (1 - grey[solid]) / 0.9 * (film.far - film.near)
        np.testing.assert_allclose(depth, picture.depth[solid], atol=1e-3)
        assert not grey[clear].any() and grey[solid].min() > 0.09


def half_planes(path: Path) -> np.ndarray:
    """float [H, W, 4] of an EXR as ffmpeg's own decoder reads it."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == "gbrapf16le"
    planes = [np.frombuffer(plane, "<f2").reshape(frame.height, -1)[:, : frame.width] for plane in frame.planes]
    return np.stack([planes[k] for k in (2, 0, 1, 3)], -1).astype(float)


def channel(path: Path, name: str) -> np.ndarray:
    """One channel of a ZIP-compressed scanline EXR, by the letter of the format's documentation."""
    data, head, at = path.read_bytes(), {}, 8
    while data[at]:
        key, _, rest = data[at:].partition(b"\0")
        kind, _, rest = rest.partition(b"\0")
        size = struct.unpack_from("<I", rest)[0]
        head[key.decode()] = (kind.decode(), rest[4 : 4 + size])
        at = len(data) - len(rest) + 4 + size
    left, top, right, bottom = struct.unpack("<4i", head["dataWindow"][1])
    width, height, lines = right - left + 1, bottom - top + 1, {b"\2": 1, b"\3": 16}[head["compression"][1]]
    kinds = re.findall(rb"([A-Z])\0(.{4}).{12}", head["channels"][1], re.S)  # name, pixel type, flags and sampling
    types = [(key.decode(), {1: "<f2", 2: "<f4"}[struct.unpack("<I", kind)[0]]) for key, kind in kinds]
    rows = []
    for (offset,) in struct.iter_unpack("<Q", data[at + 1 : at + 1 + 8 * -(-height // lines)]):
        y, size = struct.unpack_from("<iI", data, offset)
        count = min(lines, height - (y - top))
        raw, whole = data[offset + 8 : offset + 8 + size], count * width * sum(int(t[2]) for _, t in types)
        if size < whole:
            steps = np.frombuffer(zlib.decompress(raw), np.uint8).astype(int)
            half = np.concatenate([steps[:1], steps[1:] - 128]).cumsum().astype(np.uint8)
            bytes_of = np.empty_like(half)
            bytes_of[0::2], bytes_of[1::2] = half[: (whole + 1) // 2], half[(whole + 1) // 2 :]
            raw = bytes_of.tobytes()
        for line in range(count):
            start = line * (whole // count)
            for key, kind in types:
                if key == name:
                    rows.append(np.frombuffer(raw, kind, width, start))
                start += width * int(kind[2])
    return np.stack(rows)


def test_exr_is_scene_linear_half_premultiplied_with_depth_in_z(tmp_path):
    pytest.importorskip("OpenEXR", reason="OpenEXR is not installed: pip install -e '.[exr]'")
    wishes = {"seconds": 0.1, "time": 0.0}
    film = render(moving_ball(), "turntable", tmp_path, format="exr", size=(45, 33), passes=["depth"], **wishes)
    for k, picture in enumerate(truth(film, "turntable", (45, 33), **wishes), 1):
        file = film.path / f"turntable_{k:04d}.exr"
        display = picture.color / np.maximum(picture.alpha, 1e-6)
        linear = np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)
        rgba = half_planes(file)
        np.testing.assert_allclose(rgba[..., :3], linear * picture.alpha, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(rgba[..., 3:], picture.alpha, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(channel(file, "A"), rgba[..., 3])
        depth, seen = channel(file, "Z"), picture.alpha[..., 0] > 1 / 255
        assert depth.dtype == np.float32 and (depth[~seen] == np.float32(NOTHING)).all()
        np.testing.assert_allclose(depth[seen], picture.depth[seen], rtol=1e-6)


def test_the_background_is_the_colour_that_was_asked_for(tmp_path):
    for text, rgb in (("#20a040", (32, 160, 64)), ("black", (0, 0, 0)), (None, (255, 255, 255))):
        film = render(
            moving_ball(), "turntable", tmp_path / "a.mp4", size=(32, 32), seconds=0.05, background=text, overwrite=True
        )
        np.testing.assert_allclose(decoded(film.path)[0, 1, 1] * 255, rgb, atol=4)


def test_the_input_stands_at_the_left_at_the_same_time(made, tmp_path):
    film = render(made, "input", tmp_path / "a.mp4", size=(64, 48), beside_input=True)
    pictures = decoded(film.path)
    assert (film.width, film.height) == (128, 48) == pictures.shape[2:0:-1]
    left = [red_column(p[:, :64]) for p in pictures]
    right = [red_column(p[:, 64:]) for p in pictures]
    np.testing.assert_allclose(left, right, atol=1)
    assert right[-1] - right[0] > 5
    shutil.copytree(
        made / "recon" / "main", tmp_path / "recon" / "main"
    )  # no matrix: the small pictures that were kept
    film = render(
        tmp_path / "recon" / "main", "orbit-time", tmp_path / "b.mp4", fps=2, size=(64, 48), beside_input=True
    )
    assert decoded(film.path).shape[2:0:-1] == (128, 48)


# -- what is refused, and that nothing is harmed -----------------------------------------------------------


def test_wrong_wishes_are_refused_before_anything_is_drawn(made, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "draw", lambda *words, **options: pytest.fail("drew"))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.json").write_text(
        '{"camera_path": [{"camera_to_world": [1, 2], "fov": 50}], "render_width": 64, "render_height": 64}'
    )
    (tmp_path / "clip.mp4").mkdir()
    cases = [
        ({"path": "spiral"}, "expected turntable, orbit-time, bullet, input"),
        ({"path": tmp_path / "none.json"}, "does not exist"),
        ({"path": tmp_path / "bad.json"}, "camera 0: camera_to_world must be 16 numbers"),
        ({"path": "input", "turns": 2}, "--turns means nothing with --path input"),
        ({"path": "orbit-time", "time": 0.5}, "--time means nothing"),
        ({"size": (8, 64)}, "size must be within 16..8192"),
        ({"fps": math.nan}, "fps must be in"),
        ({"seconds": -1}, "seconds"),
        ({"turns": 0}, "turns must not be 0"),
        ({"time": 1.5}, "time must be in 0..1"),
        ({"elevation_deg": 90}, "elevation_deg"),
        ({"fov_deg": 0}, "fov_deg"),
        ({"format": "avi"}, "known: mp4, webm"),
        ({"background": "grey"}, "#rrggbb"),
        ({"background": "#12345g"}, "#rrggbb"),
        ({"background": "transparent"}, "mp4 keeps no alpha"),
        ({"passes": ["normal"]}, "known: alpha, depth"),
        ({"passes": ["alpha"], "beside_input": True}, "beside the input"),
        ({"format": "gif", "fps": 60}, "gif plays at most 50"),
        ({"out": "-"}, "must be a folder"),
        ({"out": ""}, "must be a folder"),
        ({"out": tmp_path / "x.avi"}, "file with suffix"),
        ({"out": tmp_path / "x.mp4", "format": "webm"}, "suffix .webm"),
        ({"out": tmp_path / "x.png"}, "--out DIR"),
        ({"out": tmp_path / "a.txt" / "x.mp4"}, "is a file"),
        ({"device": "tpu"}, "--device"),
        ({"seconds": 3600, "fps": 1000}, "more than 100000"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            render(made, **options)
    with pytest.raises(InputError, match="pass out="):
        render(moving_ball())
    with pytest.raises(InputError, match=r"Gaussians in memory: the cameras of the input are not known"):
        render(moving_ball(), "input", tmp_path)
    with pytest.raises(InputError, match="no pictures of the input"):
        render(moving_ball(), "turntable", tmp_path, beside_input=True)
    assert not (made / "recon/main/render").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "bad.json", "clip.mp4"}


@pytest.mark.row(60)
def test_row_60_what_the_machine_lacks_is_named(made, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(SetupError, match=r"--device cuda: torch .* sees no such GPU"):
            render(made, device="cuda")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(SetupError, match=r"pip install 'd2-4d\[exr\]'"):
        render(made, format="exr")


def test_existing_outputs_are_a_conflict_until_replaced(made, tmp_path):
    options = {"size": (32, 32), "seconds": 0.1}
    film = render(made, "turntable", tmp_path, format="png", **options)
    with pytest.raises(ConflictError, match="turntable_png exists; pass --overwrite"):
        render(made, "turntable", tmp_path, format="png", **options)
    assert render(made, "turntable", tmp_path, format="png", overwrite=True, **options) == film
    (tmp_path / "mine_png").mkdir()
    (tmp_path / "v.mp4").write_bytes(b"mine")
    with pytest.raises(ConflictError, match=r"v\.mp4 exists"):
        render(made, "turntable", tmp_path / "v.mp4", **options)


def test_a_stop_leaves_what_was_there_and_nothing_else(made, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    calls = iter([0, 0, 2, 2])
    with pytest.raises(Stopped, match="stopped at picture 2 of") as caught:
        render(
            made,
            "turntable",
            tmp_path / "a.mp4",
            size=(32, 32),
            overwrite=True,
            passes=["alpha"],
            should_stop=lambda: next(calls),
        )
    assert caught.value.exit_code == 130
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"old")]


@pytest.fixture
def d2(monkeypatch, capsys):
    """`d2("render", path)`: the command within this process, through its error border."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["d2", *map(str, words)])
        code = 0
        try:
            app.main()
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


def test_ctrl_c_leaves_no_partial_file(d2, made, tmp_path, monkeypatch):
    whole = drawing.draw

    def interrupted(*words, **options):
        for k, picture in enumerate(whole(*words, **options)):
            if k == 2:
                signal.raise_signal(signal.SIGINT)
            yield picture

    monkeypatch.setattr(drawing, "draw", interrupted)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        done = d2("render", made, "--out", tmp_path, "--size", "32", "--passes", "alpha")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert done.code == 130 and done.stderr.splitlines()[-1].startswith("error: stopped at picture 2 of 48")
    assert list(tmp_path.iterdir()) == []


def test_command_says_what_was_written(d2, made, tmp_path):
    options = ("--size", "33x20", "--seconds", "0.2", "--out", tmp_path / "a.mp4")
    done = d2("render", made, *options)
    assert done.code == 0 and done.stdout == f"{tmp_path / 'a.mp4'}: 2 frames, 34×20, 12 a second\n"
    done = d2("render", made, "--path", "input", "--format", "gif", "--json", "--passes", "alpha")
    told = json.loads(done.stdout)
    assert told["path"] == str(made / "recon/main/render/input.gif") and Path(told["passes"]["alpha"]).is_file()
    assert (told["frames"], told["width"], told["height"], told["fps"]) == (FRAMES, SIZE, SIZE, FPS)
    assert d2("render", made, "--size", "big").code == 3
