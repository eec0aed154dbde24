import numpy as np
import pytest
import torch
from PIL import Image

from d2.errors import InputError
from d2.preprocess import (
    Box,
    foreground,
    frame_picture,
    on_white,
    recentre,
    square_side,
    to_tensor,
    union,
    whole,
)


def picture(width, height, box, colour=(200, 40, 90, 255)):
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    image.paste(Image.new("RGBA", (box.width, box.height), colour), (box.x, box.y))
    return image


def centroid(array):
    """Centre of what is not white, in pixels (x, y)."""
    y, x = np.nonzero((array < 250).any(-1))
    return x.mean(), y.mean()


def test_the_box_holds_every_pixel_that_is_not_fully_transparent():
    image = picture(40, 30, Box(5, 7, 10, 3))
    image.putpixel((30, 20), (0, 0, 0, 1))
    assert foreground(image) == Box(5, 7, 26, 14)


@pytest.mark.row(7)
def test_a_single_opaque_pixel_is_a_foreground():
    box = Box(39, 29, 1, 1)
    assert foreground(picture(40, 30, box)) == box
    assert frame_picture(picture(40, 30, box), size=16).shape == (16, 16, 3)


@pytest.mark.row(7)
def test_a_fully_transparent_picture_is_refused():
    with pytest.raises(InputError, match="no foreground"):
        frame_picture(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))


@pytest.mark.parametrize("box", [Box(10, 20, 60, 30), Box(0, 0, 20, 50), Box(70, 5, 30, 90)])
@pytest.mark.parametrize("ratio", [0.9, 0.5, None])
@pytest.mark.parametrize("size", [(100, 100), (300, 100), (100, 300)])
def test_the_object_ends_up_in_the_middle_for_any_shape_of_picture(size, ratio, box):
    made = frame_picture(picture(size[0], size[1], box), ratio, size=128)
    x, y = centroid(made)
    assert abs(x - 63.5) < 2
    assert abs(y - 63.5) < 2


def test_the_longer_side_takes_up_the_ratio_of_the_picture():
    made = frame_picture(picture(300, 1000, Box(50, 100, 40, 200)), 0.8, size=100)
    rows = np.nonzero((made < 128).any(axis=(1, 2)))[0]
    columns = np.nonzero((made < 128).any(axis=(0, 2)))[0]
    assert abs(len(rows) - 80) <= 1
    assert abs(len(columns) - 16) <= 1


def test_without_a_ratio_a_wide_object_makes_the_square_wider_than_the_picture():
    assert square_side(Box(0, 0, 179, 39), None, image_height=59) == 179
    assert square_side(Box(0, 0, 30, 39), None, image_height=59) == 59


def test_a_video_frame_without_a_ratio_keeps_its_place():
    still, moved = picture(64, 64, Box(10, 10, 20, 20)), picture(64, 64, Box(30, 10, 20, 20))
    first, second = (centroid(frame_picture(image, None, video=True, size=64)) for image in (still, moved))
    assert second[0] - first[0] == pytest.approx(20, abs=0.5)
    assert second[1] == pytest.approx(first[1], abs=0.5)


def test_one_box_for_a_clip_keeps_the_motion_that_single_boxes_remove():
    frames = [picture(64, 64, Box(x, 20, 10, 10)) for x in (10, 20, 30)]
    box = union([foreground(frame) for frame in frames])
    assert box == Box(10, 20, 30, 10)
    side = square_side(box, 0.9, 64)
    clip = [centroid(on_white(recentre(frame, box, side, 66)))[0] for frame in frames]
    alone = [centroid(frame_picture(frame, 0.9, size=66))[0] for frame in frames]
    assert np.diff(clip) == pytest.approx([20, 20], abs=1)
    assert np.diff(alone) == pytest.approx([0, 0], abs=0.1)


def test_colours_do_not_bleed_out_of_transparent_pixels():
    image = Image.new("RGBA", (20, 20), (0, 255, 0, 0))
    image.paste(Image.new("RGBA", (10, 10), (255, 0, 0, 255)), (5, 5))
    made = frame_picture(image, 0.5, size=97).astype(int)
    green_over_blue = made[..., 1] - made[..., 2]
    assert abs(green_over_blue).max() <= 1


def test_levels_on_white_are_cut_off_not_rounded():
    image = Image.new("RGBA", (1, 1), (10, 20, 30, 128))
    a = 128 / 255
    expected = [int((c / 255 * a + 1 - a) * 255) for c in (10, 20, 30)]
    assert on_white(image)[0, 0].tolist() == expected


def test_the_networks_take_minus_one_to_one():
    tensor = to_tensor(np.array([[[0, 255, 51]]], dtype=np.uint8))
    assert tensor.shape == (3, 1, 1)
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_a_ratio_that_makes_no_sense_is_refused(ratio):
    with pytest.raises(InputError, match="ratio"):
        frame_picture(picture(9, 9, Box(1, 1, 5, 5)), ratio)


def test_an_object_larger_than_its_square_is_refused():
    with pytest.raises(InputError, match="does not fit"):
        recentre(picture(40, 40, Box(0, 0, 30, 30)), Box(0, 0, 30, 30), side=20)


def test_the_whole_picture_is_a_box():
    assert whole(Image.new("RGBA", (30, 20))) == Box(0, 0, 30, 20)
