"""Encoded video, decoded by another program: size, rate, count, colour and alpha, and nothing half written."""

import io
import os
import stat

import av
import numpy as np
import pytest
from PIL import Image

from d2 import video
from d2.errors import InputError, ResourceError, SetupError

WIDTH, HEIGHT, COUNT = 48, 32, 6
EVERY = [(name, alpha) for name, codec in video.CODECS.items() for alpha in (False, True) if codec.alpha or not alpha]


def ball(k: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [H, W, 4]: an orange disc that moves right by four pixels a frame."""
    y, x = np.mgrid[:height, :width] + 0.5
    alpha = np.clip(8.5 - np.hypot(x - 12 - 4 * k, y - 16), 0, 1)
    frame = np.stack([0.9 * np.ones_like(alpha), 0.5 * np.ones_like(alpha), 0.1 * np.ones_like(alpha), alpha], -1)
    return (frame * 255 + 0.5).astype(np.uint8)


def on_white(frame: np.ndarray) -> np.ndarray:
    alpha = frame[..., 3:] / 255
    return (frame[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def decoded(path) -> tuple[np.ndarray, float]:
    """uint8 frames [n, H, W, 4] and how many a second, by PyAV; animated WebP by Pillow."""
    if path.suffix == ".webp":
        image, frames, shown = Image.open(path), [], 0
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGBA")))
            shown += image.info["duration"]
        return np.stack(frames), 1000 * len(frames) / shown
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if path.suffix == ".webm":  # ffmpeg's own decoder of VP9 drops alpha
            decoder = av.codec.CodecContext.create("libvpx-vp9", "r")
            frames = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
        else:
            frames = list(container.decode(stream))
        # Its conversion to rgba leaves columns out where the width is no multiple of 16; alpha is tested at such.
        clear = frames[0].format.name.startswith(("yuva", "bgra"))
        pixels = np.stack([frame.to_ndarray(format="rgba" if clear else "rgb24") for frame in frames])
        if not clear:
            pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], -1)
        times = [float(frame.time) for frame in frames]
    return pixels, (len(times) - 1) / (times[-1] - times[0])


@pytest.mark.parametrize(("name", "alpha"), EVERY)
def test_every_format_decodes_with_its_size_rate_count_colours_and_alpha(tmp_path, name, alpha):
    frames = [ball(k) if alpha else on_white(ball(k)) for k in range(COUNT)]
    path = tmp_path / f"a{video.CODECS[name].suffix}"
    video.write(path, iter(frames), 12.5, name)
    pixels, rate = decoded(path)
    assert pixels.shape == (COUNT, HEIGHT, WIDTH, 4) and rate == pytest.approx(12.5, abs=0.01)
    for k in range(COUNT):
        middle = 16, 12 + 4 * k
        np.testing.assert_allclose(pixels[k][middle], [230, 128, 26, 255], atol=14 if name == "webp" else 6)
        assert pixels[k, 1, 1, 3] == (0 if alpha else 255)
        if alpha:
            edges = 140 if name == "gif" else 40  # a GIF's transparency is all or nothing
            np.testing.assert_allclose(pixels[k][..., 3].astype(int), ball(k)[..., 3], atol=edges)


@pytest.mark.parametrize(("name", "grown"), [("mp4", True), ("webm", True), ("prores", False), ("gif", False)])
def test_odd_sides_grow_by_a_repeated_row_and_column_where_chroma_is_halved(tmp_path, name, grown):
    path = tmp_path / f"a{video.CODECS[name].suffix}"
    frames = [on_white(ball(k, 33, 25)) for k in range(3)]
    video.write(path, iter(frames), 10, name)
    pixels, _ = decoded(path)
    assert pixels.shape[1:3] == ((26, 34) if grown else (25, 33))
    assert video.encoded_size(33, 25, video.CODECS[name]) == ((34, 26) if grown else (33, 25))
    assert np.abs(pixels[:, :25, :33, :3].astype(int) - np.stack(frames)).mean() < 6


@pytest.mark.parametrize("fps", [23.976, 24000 / 1001, 29.97, 0.5])
def test_broken_rates_are_kept(tmp_path, fps):
    video.write(tmp_path / "a.mp4", [on_white(ball(k)) for k in range(3)], fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        rate = container.streams.video[0].average_rate
    assert rate is not None and float(rate) == pytest.approx(fps, rel=1e-5)


def test_prores_keeps_more_than_eight_bits(tmp_path):
    ramp = np.linspace(20000, 22000, 256).astype(np.uint16)  # eight bits see eight levels in it
    frame = np.broadcast_to(ramp[None, :, None], (32, 256, 3)).copy()
    with video.writer(tmp_path / "a.mov", 256, 32, 24, video.CODECS["prores"]) as send:
        send(frame)
    with av.open(str(tmp_path / "a.mov")) as container:
        (decoded_frame,) = container.decode(video=0)
        pixels = decoded_frame.to_ndarray(format="rgb48le")
    assert len(np.unique(pixels[16, :, 1])) > 20
    assert np.abs(pixels.astype(int) - frame).mean() < 150


def test_colours_are_tagged_as_they_are_coded(tmp_path):
    video.write(tmp_path / "a.mp4", [on_white(ball(0))], 24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1)  # BT.709


def test_a_frame_that_fails_leaves_the_old_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")

    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        raise InputError("frame 1 is damaged")

    with pytest.raises(InputError, match="frame 1 is damaged"):
        video.write(tmp_path / "a.mp4", frames(), 12)
    with pytest.raises(KeyboardInterrupt), video.writer(tmp_path / "a.mp4", 16, 16, 12, video.CODECS["mp4"]):
        raise KeyboardInterrupt
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"old")]


def test_what_cannot_be_encoded_is_refused(tmp_path):
    with pytest.raises(ResourceError, match="there are no frames"):
        video.write(tmp_path / "a.mp4", iter([]), 12)
    with pytest.raises(InputError, match="gif plays at most 50 frames a second, got 60"):
        video.write(tmp_path / "a.gif", [ball(0)], 60, "gif")
    assert list(tmp_path.iterdir()) == []


def program(path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    os.chmod(path, path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.row(60)
def test_row_60_an_ffmpeg_without_the_encoder_is_named_with_the_line_that_installs_one(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program(tmp_path / "ffmpeg", "echo ' V....D libx264  H.264'"))
    with pytest.raises(SetupError, match=r"no encoder libvpx-vp9.*pip install 'imageio\[ffmpeg\]'"):
        video.write(tmp_path / "a.webm", [ball(0)], 12, "webm")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(SetupError, match="ffmpeg"):
        video.write(tmp_path / "a.mp4", [ball(0)[..., :3]], 12)


def test_the_last_words_of_an_ffmpeg_that_fails_are_told(tmp_path, monkeypatch):
    failing = 'case "$*" in *-encoders*) echo " V libx264 x";; *) echo "disk on fire" >&2; exit 1;; esac'
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program(tmp_path / "ffmpeg", failing))
    with pytest.raises(ResourceError, match=r"a\.mp4: ffmpeg: disk on fire"):
        video.write(tmp_path / "a.mp4", [ball(0)[..., :3]] * 40, 12)
    assert not (tmp_path / "a.mp4").exists()


def test_gif_and_webp_play_for_ever(tmp_path):
    for name in ("gif", "webp"):
        video.write(tmp_path / f"a.{name}", [ball(k) for k in range(3)], 10, name)
        assert Image.open(io.BytesIO((tmp_path / f"a.{name}").read_bytes())).info["loop"] == 0
