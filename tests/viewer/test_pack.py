"""What is packed comes back within the steps of its integers; the same Gaussians give the same bytes."""

from __future__ import annotations

import gzip
import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from pages import random_asset

from d2.errors import InputError
from d2.recon.gaussians import Gaussians4D
from d2.recon.raster import sh
from d2.recon.viewer import pack


def unpacked(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and values: the slow twin of `pack`, as shader and sorter read the records."""
    assert data[:4] == pack.MAGIC
    (length,) = struct.unpack("<I", data[4:8])
    header = json.loads(data[8 : 8 + length])
    planes = np.frombuffer(gzip.decompress(data[8 + length :]), np.uint8)
    words = np.ascontiguousarray(planes.reshape(-1, header["count"]).T).view("<u4").astype(np.uint32)

    def bits(word: int, low: int, count: int) -> np.ndarray:
        return (words[:, word] >> low & ((1 << count) - 1)) / ((1 << count) - 1)

    def half(word: int, low: int) -> np.ndarray:
        return (words[:, word] >> low & 0xFFFF).astype(np.uint16).view(np.float16).astype(float)

    box = np.array(header["box"])
    others = np.column_stack([bits(4, 10 * k, 10) for k in range(3)]) * np.sqrt(2) - np.sqrt(0.5)
    largest = words[:, 4] >> 30
    quats = np.empty((len(words), 4))
    quats[np.arange(4) != largest[:, None]] = others.ravel()
    quats[np.arange(len(words)), largest] = np.sqrt(np.maximum(0, 1 - (others**2).sum(1)))
    values = {
        "means": box[:3] + box[3:] * np.column_stack([bits(0, 0, 16), bits(0, 16, 16), bits(1, 0, 16)]),
        "times": header["time"][0] + header["time"][1] * bits(1, 16, 16),
        "velocities": np.column_stack([half(2, 0), half(2, 16), half(3, 0)]),
        "inverse_durations": half(3, 16),
        "quats": quats,
        "log_scales": header["scale"][0]
        + header["scale"][1] * np.column_stack([bits(5, 10 * k, 10) for k in range(3)]),
        "colors": header["color"][0] + header["color"][1] * np.column_stack([bits(6, 8 * k, 8) for k in range(3)]),
        "opacities": bits(6, 24, 8),
    }
    if header["words"] == 10:
        rows = [np.column_stack([bits(word, 10 * k, 10) for k in range(3)]) for word in (7, 8, 9)]
        values["sh"] = header["sh"] * (2 * np.stack(rows, 1) - 1)
    return header, values


def matched(gaussians: Gaussians4D, values: dict[str, np.ndarray]) -> np.ndarray:
    """For every packed Gaussian the index of the nearest one that went in."""
    apart = np.linalg.norm(values["means"][:, None] - gaussians.means.numpy(), axis=-1)
    return apart.argmin(1)


@pytest.mark.parametrize("degree", [0, 1])
def test_every_value_comes_back_within_a_step_of_its_own(degree):
    asset = random_asset(300, degree)
    header, values = unpacked(pack.pack(asset, degree))
    index = matched(asset, values)
    assert header["count"] == 300 == len(set(index)) and header["words"] == {0: 7, 1: 10}[degree]

    def close(name: str, wanted: torch.Tensor, tolerance: float | np.ndarray) -> None:
        assert (np.abs(values[name] - wanted.numpy()[index]) <= tolerance).all(), name

    close("means", asset.means, 3 * np.array(header["box"][3:]) / 65535)  # at the box's end; 2 elsewhere
    close("times", asset.times, 15 * header["time"][1] / 65535)  # likewise; 8
    close("velocities", asset.velocities, 1e-4 + np.abs(asset.velocities.numpy()[index]) / 200)
    brief = (-asset.log_durations).exp()
    close("inverse_durations", brief, brief.numpy()[index] / 200)
    close("log_scales", asset.log_scales, header["scale"][1] / 1023)
    close("opacities", asset.opacity_logits.sigmoid(), 1 / 255)
    close("colors", (sh.C0 * asset.sh[:, 0] + 0.5).clamp(min=header["color"][0]), header["color"][1] / 255)
    unit = torch.nn.functional.normalize(asset.quats, dim=-1).numpy()[index]
    assert (np.abs((unit * values["quats"]).sum(1)) > 1 - 1e-5).all()
    if degree:
        close("sh", asset.sh[:, 1:], header["sh"] / 511)


def test_same_gaussians_give_the_same_bytes_and_neighbours_lie_together():
    asset = random_asset(2000)
    data = pack.pack(asset)
    assert data == pack.pack(asset)
    _, values = unpacked(data)
    steps = np.linalg.norm(np.diff(values["means"], axis=0), axis=1).mean()
    assert steps < 0.5 * np.linalg.norm(np.diff(asset.means.numpy(), axis=0), axis=1).mean()


def test_what_no_pixel_can_show_is_left_out():
    asset = random_asset(100)
    asset.opacity_logits[:30] = -6.0  # opacity 0.0025 < 1/255
    asset.times[30:40], asset.log_durations[30:40] = 9.0, -2.0  # long after the clip
    assert unpacked(pack.pack(asset))[0]["count"] == 60
    asset.opacity_logits[:] = -10.0
    with pytest.raises(InputError, match="nothing to show"):
        pack.pack(asset)


def test_extremes_stay_finite():
    asset = random_asset(8)
    asset.velocities[0], asset.log_durations[1], asset.log_durations[2] = 1e9, -40.0, 40.0
    asset.times[1], asset.sh[3], asset.means[4] = 0.5, 1e6, 1e6
    _, values = unpacked(pack.pack(asset))
    assert all(np.isfinite(array).all() for array in values.values())


def test_one_gaussian_alone_and_an_unknown_degree():
    asset = random_asset(1)
    asset.times[:], asset.log_durations[:], asset.opacity_logits[:] = 0.5, 0.0, 2.0
    _, values = unpacked(pack.pack(asset, degree=1))  # degree 0 is all it has
    np.testing.assert_allclose(values["means"], asset.means.numpy(), atol=1e-6)
    with pytest.raises(InputError, match="degree 0 or 1"):
        pack.pack(asset, degree=2)


def test_20000_gaussians_take_less_than_800_kb_as_a_page():
    from d2.recon.viewer import page

    data = pack.pack(random_asset(20000))
    assert len(page.page("asset", {}, data).encode()) < 800_000
