import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from d2 import images
from d2.errors import InputError


def saved(path, image: Image.Image, format: str | None = None, **options):
    image.save(path, format, **options)
    return path


def gradient(width: int = 6, height: int = 4) -> Image.Image:
    return Image.fromarray((np.arange(height * width * 3) * 3 % 251).astype(np.uint8).reshape(height, width, 3))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = saved(tmp_path / "a.png", gradient(), exif=exif)
    rgba, has_alpha = images.read_rgba(path)
    assert rgba.shape == (6, 4, 4) and not has_alpha
    np.testing.assert_array_equal(rgba[..., :3], np.rot90(np.asarray(gradient()), -1))


@pytest.mark.parametrize("peak", [65535, 257 * 40, 200])
def test_16_bit_grey_is_scaled_by_its_depth_however_dark_it_is(tmp_path, peak):
    path = saved(tmp_path / "a.png", Image.fromarray(np.array([[0, peak]], np.uint16)))
    rgba, _ = images.read_rgba(path)
    assert rgba[0, :, 0].tolist() == [0, round(peak / 257)]


def test_palette_with_transparency_has_alpha(tmp_path):
    image = gradient().quantize(8)
    path = saved(tmp_path / "a.png", image, transparency=int(np.asarray(image)[0, 0]))
    rgba, has_alpha = images.read_rgba(path)
    assert has_alpha and rgba[0, 0, 3] == 0 and rgba[..., 3].max() == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "LAB", "YCbCr"])
def test_every_common_mode_becomes_rgba(tmp_path, mode):
    path = tmp_path / "a.tif"
    image = Image.fromarray(np.full((3, 5), 9000, np.uint16)) if mode == "I;16" else gradient(5, 3).convert(mode)
    saved(path, image)
    rgba, has_alpha = images.read_rgba(path)
    assert rgba.shape == (3, 5, 4) and rgba.dtype == np.uint8 and has_alpha == (mode in ("LA", "RGBA"))


def test_floating_point_pixels_are_refused_in_one_line(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(np.full((3, 5), 0.5, np.float32)))
    with pytest.raises(InputError, match="floating-point"):
        images.read_rgba(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_truncated_images_are_refused_at_any_length(tmp_path, suffix):
    path = saved(tmp_path / f"a{suffix}", gradient(32, 32))
    data = path.read_bytes()
    for length in (0, 1, 10, len(data) // 3, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=f"a{suffix}"):
            images.read_rgba(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"\x89PNG"],
)
def test_files_that_only_pretend_to_be_images_are_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png is not a readable image") as caught:
        images.read_rgba(path)
    assert "object at" not in str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (60000, 60000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_giant_images_are_refused_by_their_header(tmp_path, width, height):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(InputError, match=r"a\.png"):
        images.read_rgba(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_mutated_images_are_read_or_refused_but_nothing_else(tmp_path, format):
    buffer = io.BytesIO()
    gradient(16, 16).save(buffer, format)
    rng, path = random.Random(0), tmp_path / "a.img"
    for _ in range(150):
        data = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert images.read_rgba(path)[0].shape[2] == 4
        except InputError as error:
            assert "a.img" in str(error)


def test_png_of_the_same_array_has_the_same_bytes_and_comes_back(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    assert images.png_bytes(array) == images.png_bytes(array.copy())
    images.write_png(tmp_path / "a.png", array)
    np.testing.assert_array_equal(images.read_rgba(tmp_path / "a.png")[0], array)
    assert images.read_size(tmp_path / "a.png") == (7, 5)


def test_resize_filters_premultiplied_so_that_transparent_colour_does_not_bleed():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 255, 0, 0)  # invisible green
    np.testing.assert_allclose(images.resize_rgba(rgba, 1, 1)[0, 0], [0.25, 0, 0, 0.25], atol=1e-6)


def test_resize_to_half_is_the_mean_of_four_pixels():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 12, 4), np.uint8)
    rgba[..., 3] = 255
    expected = (rgba / 255).reshape(4, 2, 6, 2, 4).mean((1, 3))
    np.testing.assert_allclose(images.resize_rgba(rgba, 6, 4), expected, atol=1e-5)


def test_resize_to_the_same_size_only_premultiplies():
    rgba = np.array([[[200, 100, 50, 51]]], np.uint8)
    np.testing.assert_allclose(images.resize_rgba(rgba, 1, 1)[0, 0] * 255, [40, 20, 10, 51], rtol=1e-5)


def test_float_pictures_are_rounded_and_clipped():
    assert images.to_uint8(np.array([-1, 0, 0.5, 1, 2, 0.0019, 0.002])).tolist() == [0, 0, 128, 255, 255, 0, 1]
