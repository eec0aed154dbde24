"""Shots: the camera stands where it should and the clip plays as it should, picture by picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scenes import FRAMES, SIZE, VIEWS, moving_ball

from d2 import camera
from d2.recon import cameras, shots
from d2.recon.sources import Source


def source(frames: int = 25, fps: float = 24.0) -> Source:
    return Source(moving_ball(), None, "ball", fps, frames)


def test_the_clip_plays_at_its_own_speed_whatever_the_rate_and_again_and_again():
    np.testing.assert_allclose(shots.clip_times(25, 24, 24, 50), np.tile(np.linspace(0, 1, 25), 2), atol=1e-12)
    np.testing.assert_allclose(shots.clip_times(5, 10, 20, 12), np.minimum(np.arange(12) / 2 % 5, 4) / 4)
    assert not shots.clip_times(1, 24, 24, 3).any()


def test_a_turntable_turns_once_while_time_stands_and_closes():
    shot = shots.plan("turntable", source(), shots.Wishes(seconds=2, time=0.25))
    assert len(shot.times) == 48 and (shot.times == 0.25).all() and shot.fps == 24
    around = np.unwrap(np.arctan2(shot.c2w[:, 0, 2], -shot.c2w[:, 1, 2]))
    np.testing.assert_allclose(around, 2 * np.pi * np.arange(48) / 48, atol=1e-9)  # the next picture is the first
    back = shots.plan("turntable", source(), shots.Wishes(seconds=2, turns=-2))
    np.testing.assert_allclose(np.unwrap(np.arctan2(back.c2w[:, 0, 2], -back.c2w[:, 1, 2]))[-1], -4 * np.pi * 47 / 48)


@pytest.mark.parametrize(("frames", "seconds", "fps", "count"), [(25, 4, 24, 100), (25, 4, 48, 200), (240, 4, 24, 240)])
def test_an_orbit_in_time_takes_whole_plays_of_the_clip(frames, seconds, fps, count):
    shot = shots.plan("orbit-time", source(frames), shots.Wishes(seconds=seconds, fps=fps))
    assert len(shot.times) == count and shot.times[0] == 0
    assert (np.diff(shot.times) < -0.5).sum() == count * 24 / fps / frames - 1


def test_bullet_time_plays_stands_while_the_camera_goes_round_and_plays_on():
    shot = shots.plan("bullet", source(), shots.Wishes(seconds=1, time=0.5))
    assert len(shot.times) == 24 + 24 and (np.diff(shot.times) >= 0).all()
    stands = shot.times == 0.5
    assert stands.sum() == 24
    front = shot.c2w[0]
    np.testing.assert_allclose(shot.c2w[~stands], np.broadcast_to(front, (24, 4, 4)), atol=1e-12)
    np.testing.assert_allclose(shot.c2w[stands][12][:2, 2], -front[:2, 2], atol=1e-9)  # half way it is at the back


def write_path(file: Path, rig: camera.Rig, **extra) -> Path:
    """nerfstudio's viewer: rows in one list, vertical field of view in degrees."""
    fov = math.degrees(2 * math.atan(rig.height / (2 * rig.focal)))
    each = [
        {"camera_to_world": c2w.flatten().tolist(), "fov": fov, "aspect": rig.width / rig.height} for c2w in rig.c2w
    ]
    for entry, time_of in zip(each, extra.pop("times", []), strict=False):
        entry["time"] = time_of
    path = {
        "camera_type": "perspective",
        "render_width": rig.width,
        "render_height": rig.height,
        "fps": 10,
        "seconds": 1,
    }
    file.write_text(json.dumps(path | {"camera_path": each} | extra))
    return file


def test_a_camera_path_of_nerfstudio_films_what_its_cameras_see(tmp_path):
    rig = camera.orbit(3, radius=3.0, width=60, height=40)
    shot = shots.plan(str(write_path(tmp_path / "my path.json", rig, times=[0.0, 0.4, 1.0])), source(), shots.Wishes())
    assert (shot.name, shot.width, shot.height, shot.fps) == ("my_path", 60, 40, 10)
    np.testing.assert_allclose(shot.times, [0, 0.4, 1])
    np.testing.assert_allclose(shot.c2w, rig.c2w, atol=1e-12)
    np.testing.assert_allclose(shot.Ks, np.broadcast_to(rig.K, (3, 3, 3)), atol=1e-9)
    untimed = shots.plan(str(write_path(tmp_path / "p.json", rig)), source(fps=5.0), shots.Wishes())
    np.testing.assert_allclose(untimed.times, [0, 0.5 / 24, 1 / 24])  # as the clip plays at 10 pictures a second
    larger = shots.plan(str(tmp_path / "p.json"), source(), shots.Wishes(size=(120, 120)))
    np.testing.assert_allclose(larger.Ks[0], [[2 * rig.focal, 0, 60], [0, 2 * rig.focal, 60], [0, 0, 1]])


def test_a_transforms_file_films_a_picture_a_frame(run_folder):
    shot = shots.plan(str(run_folder / "transforms.json"), source(), shots.Wishes())
    assert len(shot.times) == VIEWS * FRAMES and (shot.width, shot.height) == (SIZE, SIZE)
    np.testing.assert_allclose(shot.c2w[::FRAMES], camera.orbit(VIEWS, radius=3.0, width=SIZE, height=SIZE).c2w)
    np.testing.assert_allclose(shot.times[:FRAMES], np.linspace(0, 1, FRAMES), atol=1e-6)


def test_a_camera_that_moved_while_it_filmed_is_followed(tmp_path):
    rig = camera.orbit(4, radius=3.0, width=SIZE, height=SIZE)
    folder = tmp_path / "recon" / "main"
    frames = [{"transform_matrix": c2w.tolist(), "time": k / 3, "fl_x": rig.focal} for k, c2w in enumerate(rig.c2w)]
    folder.mkdir(parents=True)
    (folder / cameras.FILE).write_text(json.dumps({"w": SIZE, "h": SIZE, "frames": frames[::-1]}))
    shot = shots.plan("input", Source(moving_ball(), folder, "ball", 24.0, 4), shots.Wishes())
    np.testing.assert_allclose(shot.c2w, rig.c2w)
    np.testing.assert_allclose(shot.times, [0, 1 / 3, 2 / 3, 1])
