""".splat: what survives, what another program reads, what is refused."""

import numpy as np
import pytest
import torch
from sets import assert_near, ordinary_set, through_splat_transform

from d2.errors import InputError
from d2.recon.formats import splat
from d2.recon.formats.frames import to_frame
from d2.recon.gaussians import Gaussians3D

BOUNDS = {"opacity": 0.002, "dc": 0.00701, "turn": 1.2e-3}


def shown(g: Gaussians3D) -> Gaussians3D:
    """What the format can hold, in its order: degree 0, colours within 0..1."""
    limit = 0.5 / 0.28209479177387814
    order = torch.argsort(-(g.scales.double().log().sum(1) + g.opacities.double().clamp_min(1e-30).log()), stable=True)
    kept = Gaussians3D(g.means, g.quats, g.scales, g.opacities, g.sh[:, :1].clamp(-limit, limit))
    return Gaussians3D(*(tensor[order] for tensor in vars(kept).values()))


@pytest.mark.row(65)
def test_200_random_sets_come_back_within_the_bounds_of_the_format(tmp_path):
    for seed in range(200):
        gaussians = ordinary_set(seed)
        splat.write(gaussians, tmp_path / "a.splat", "world")
        assert (tmp_path / "a.splat").stat().st_size == 32 * len(gaussians)
        assert_near(splat.read(tmp_path / "a.splat", "world"), shown(gaussians), **BOUNDS)


def test_splat_transform_reads_the_values_that_were_written(tmp_path):
    gaussians = shown(ordinary_set(5, 100, 0))
    splat.write(gaussians, tmp_path / "a.splat")
    got, expected = through_splat_transform(tmp_path / "a.splat"), to_frame(gaussians, "rdf")
    assert_near(got, expected, **BOUNDS | {"opacity": 0.004, "dc": 0.0072})


@pytest.mark.row(64)
def test_rows_with_nan_are_dropped_and_counted(tmp_path):
    path = tmp_path / "a.splat"
    rows = np.frombuffer(splat.encode(ordinary_set(1, 5)), splat.ROW).copy()
    rows["mean"][2, 0] = np.nan
    rows["mean"].view("<u4")[1, 1] = 0x7F800001  # a NaN that signals
    rows["quat"][3] = 128
    path.write_bytes(rows.tobytes())
    heard = []
    assert len(splat.read(path, warn=heard.append)) == 2
    assert "3 of 5" in heard[0]
    rows["scale"] = np.inf
    path.write_bytes(rows.tobytes())
    with pytest.raises(InputError, match="all 5"):
        splat.read(path)


@pytest.mark.row(63)
@pytest.mark.parametrize("size", [0, 1, 31, 33])
def test_a_size_that_is_no_number_of_rows_is_refused(tmp_path, size):
    (tmp_path / "a.splat").write_bytes(bytes(size))
    with pytest.raises(InputError, match="whole number"):
        splat.read(tmp_path / "a.splat")
