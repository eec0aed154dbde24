"""Alpha estimated from white, sheets and previews."""

import numpy as np
import pytest

from d2 import video
from d2.errors import SetupError
from d2.previews import Thumbnails, alpha_from_white, connected_to_border


def disc(size=64, radius=20.0):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)[..., None]


@pytest.mark.parametrize("colour", [(200, 30, 30), (20, 20, 20), (235, 180, 60), (90, 140, 240)])
def test_alpha_of_an_object_on_white_is_found_again(colour):
    alpha = disc()
    rgb = (alpha * np.array(colour) + (1 - alpha) * 255 + 0.5).astype(np.uint8)
    found = alpha_from_white(rgb)
    assert np.abs(found[..., 3:] / 255 - alpha).max() < 0.1
    shown = found[..., :3] * (found[..., 3:] / 255) + 255 * (1 - found[..., 3:] / 255)
    assert np.abs(shown - rgb).max() < 9  # near-white edges are cut off


def test_white_inside_the_object_stays_opaque():
    alpha = disc() * (1 - disc(radius=8))
    rgb = (alpha * 40 + (1 - alpha) * 255).astype(np.uint8).repeat(3, -1)
    assert alpha_from_white(rgb)[32, 32, 3] == 255
    assert alpha_from_white(rgb)[0, 0, 3] == 0


def test_a_white_picture_is_all_background_and_a_full_one_all_object():
    assert not alpha_from_white(np.full((16, 16, 3), 255, np.uint8)).any()
    assert (alpha_from_white(np.full((16, 16, 3), 90, np.uint8))[..., 3] == 255).all()


def test_background_is_followed_round_corners():
    maze = np.zeros((9, 9), bool)
    for row in range(1, 8, 2):
        maze[row] = True
        maze[row + 1, 7 if row % 4 == 1 else 1] = True
    maze[:, 0] = maze[:, 8] = False
    maze[8] = False
    maze[0, 4] = True
    assert (connected_to_border(maze) == maze).all()
    island = np.zeros((9, 9), bool)
    island[4, 4] = True
    assert not connected_to_border(island).any()


def test_without_ffmpeg_there_is_a_warning_and_no_video(tmp_path, monkeypatch):

    def refuse(*args):
        raise SetupError("no ffmpeg for video")

    monkeypatch.setattr(video, "write", refuse)
    told = []
    Thumbnails(3, 2).write_video(tmp_path / "preview.mp4", 6.0, told.append)
    assert "no ffmpeg" in told[0]
    assert not (tmp_path / "preview.mp4").exists()
