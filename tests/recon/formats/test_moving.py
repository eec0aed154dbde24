""".splatv and .4dgs: formats that hold the motion itself."""

import json
import struct

import numpy as np
import pytest
from sets import moving_set

from d2.recon.formats import fourdgs, splatv
from d2.recon.formats.frames import FROM_WORLD, move


def texels_of(data: bytes) -> tuple[dict, np.ndarray]:
    magic, size = struct.unpack_from("<II", data)
    assert magic == 0x674B
    (chunk,) = json.loads(data[8 : 8 + size])
    assert len(data) == 8 + size + chunk["size"]
    return chunk, np.frombuffer(data, "<u4", offset=8 + size).reshape(-1, 16)


def half(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view("<f2").astype(float)


def test_200_splatv_sets_play_as_the_page_would_play_them():
    """The page's shader in numpy: mean + velocity Δt, opacity exp(-(Δt/s)²)."""
    for seed in range(200):
        gaussians = moving_set(1 + seed % 9, seed % 2, seed)
        chunk, words = texels_of(splatv.encode(gaussians))
        assert (chunk["texwidth"], chunk["texheight"]) == (4096, 1) and len(words) == 1024
        words, t = words[: len(gaussians)], 0.3
        center, scale = half(words[:, 15:16]).T
        dt = (t - center)[:, None]
        means = words[:, :3].copy().view("<f4") + half(words[:, 8:10])[:, :3] * dt
        opacities = (words[:, 7] >> 24) / 255 * np.exp(-((dt[:, 0] / scale) ** 2))
        expected = move(gaussians, FROM_WORLD["rdf"]).at(t)
        np.testing.assert_allclose(means, expected.means, atol=2e-3)
        np.testing.assert_allclose(opacities, expected.opacities, atol=5e-3)
        np.testing.assert_allclose(half(words[:, 5:7])[:, :3], expected.scales, rtol=1e-3)
        same = np.abs((half(words[:, 3:5]) * expected.quats.numpy()).sum(1))
        np.testing.assert_allclose(same, 1, atol=2e-3)


def test_splatv_fills_whole_rows_with_nothing_to_see():
    chunk, words = texels_of(splatv.encode(moving_set(1030, 0)))
    assert chunk["texheight"] == 2 and chunk["size"] == 2 * 65536
    assert not words[1030:, :15].any()


def test_4dgs_is_read_back_with_the_same_motion_at_every_moment(tmp_path):
    package = pytest.importorskip("fourdgs", reason="fourdgs is not installed: pip install -e '.[fourdgs]'")
    gaussians = moving_set(40, 2)
    fourdgs.write(gaussians, tmp_path / "a.4dgs", 25, 12.0)
    scene = package.read(str(tmp_path / "a.4dgs"))
    assert scene.duration_sec == pytest.approx(25 / 12)
    assert scene.gaussians.sh_degree == 2 and scene.gaussians.count == 40
    for frame in (0, 10, 24):
        state = scene.gaussians.state_at(frame / 12, 1 / 255)
        expected = move(gaussians, FROM_WORLD["rub"]).at(frame / 24)
        # the container orders as it likes: match by the nearest mean
        distance = np.linalg.norm(state["centers"][:, None] - expected.means.numpy()[None], axis=-1)
        nearest = distance.argmin(1)
        assert len(set(nearest)) == len(nearest) and distance.min(1).max() < 0.012  # its default grid
        np.testing.assert_allclose(state["opacity"], expected.opacities[nearest], atol=0.03)
        missing = set(range(40)) - set(nearest.tolist())
        assert all(float(expected.opacities[k]) < 0.01 for k in missing)
