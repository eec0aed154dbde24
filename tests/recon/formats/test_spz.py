"""SPZ: what survives, what another program reads, what is refused."""

import gzip
import struct
import tracemalloc

import pytest
import torch
from sets import assert_near, ordinary_set, through_splat_transform

from d2.errors import InputError, NumericalError
from d2.recon.formats import spz
from d2.recon.formats.frames import to_frame
from d2.recon.gaussians import Gaussians3D

BOUNDS = {"mean": 1.3e-4, "log_scale": 0.0316, "opacity": 0.002, "dc": 0.0132, "rest": 0.004, "turn": 2e-5}


@pytest.mark.row(65)
def test_200_random_sets_come_back_within_the_bounds_of_the_format(tmp_path):
    for seed in range(200):
        gaussians = ordinary_set(seed)
        (tmp_path / "a.spz").write_bytes(spz.encode(gaussians, "world"))
        assert_near(spz.read(tmp_path / "a.spz", "world"), gaussians, **BOUNDS)


def test_axes_are_right_up_back(tmp_path):
    gaussians = ordinary_set(1, degree=2)
    spz.write(gaussians, tmp_path / "a.spz")
    assert_near(spz.read(tmp_path / "a.spz", "world"), to_frame(gaussians, "rub"), **BOUNDS | {"rest": 0.004})
    assert_near(spz.read(tmp_path / "a.spz"), gaussians, **BOUNDS | {"rest": 0.012})


def test_small_objects_get_finer_steps_and_large_ones_coarser(tmp_path):
    g = ordinary_set(2)
    for factor, bound in ((0.01, 1e-5), (1e5, 0.07)):
        moved = Gaussians3D(g.means * factor, g.quats, g.scales, g.opacities, g.sh)
        spz.write(moved, tmp_path / "a.spz")
        torch.testing.assert_close(spz.read(tmp_path / "a.spz").means, moved.means, atol=bound, rtol=0)
    with pytest.raises(InputError, match="coordinates below"):
        spz.encode(Gaussians3D(g.means * 1e9, g.quats, g.scales, g.opacities, g.sh))


def test_equal_content_gives_equal_bytes():
    assert spz.encode(ordinary_set(3)) == spz.encode(ordinary_set(3))


def test_header_is_that_of_version_3():
    data = gzip.decompress(spz.encode(ordinary_set(4, 7, 1)))
    assert struct.unpack("<IIIBBBB", data[:16]) == (0x5053474E, 3, 7, 1, 12, 0, 0)
    assert len(data) == 16 + 7 * (20 + 9)


@pytest.mark.parametrize("degree", [0, 3])
def test_splat_transform_reads_the_values_that_were_written(tmp_path, degree):
    gaussians = ordinary_set(5, 100, degree)
    spz.write(gaussians, tmp_path / "a.spz")
    got, expected = through_splat_transform(tmp_path / "a.spz"), to_frame(gaussians, "rdf")
    assert_near(got, expected, **BOUNDS | {"mean": 1.3e-4, "opacity": 0.003})


def test_version_2_is_read(tmp_path):
    body = struct.pack("<IIIBBBB", spz.MAGIC, 2, 1, 0, 12, 0, 0) + bytes(9) + bytes([255, 128, 128, 128])
    (tmp_path / "a.spz").write_bytes(gzip.compress(body + bytes([160, 160, 160]) + bytes([128, 127, 255])))
    got = spz.read(tmp_path / "a.spz", "world")
    torch.testing.assert_close(got.quats, torch.tensor([[0.0, 0, 0, 1]]), atol=0.1, rtol=0)
    torch.testing.assert_close(got.scales, torch.ones(1, 3))


def with_header(**changes: int) -> bytes:
    fields = {"magic": spz.MAGIC, "version": 3, "count": 5, "degree": 0, "bits": 12, "flags": 0, "zero": 0} | changes
    return gzip.compress(struct.pack("<IIIBBBB", *fields.values()) + bytes(100))


@pytest.mark.row(66)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header"), (b"NGSP" * 20, "not an SPZ"), (with_header(magic=1), "first word"),
        (with_header(version=4), "version 4"), (with_header(count=0), "0 Gaussians"),
        (with_header(count=4_000_000_000), "4000000000 Gaussians"), (with_header(count=50_000_000), "truncated"),
        (with_header(count=6), "truncated"), (with_header(degree=4), "degree 4"), (with_header(bits=60), "60"),
        (with_header()[:-30], "truncated|header"), (gzip.compress(b"short"), "header"),
    ],
)  # fmt: skip
def test_what_is_no_spz_is_refused(tmp_path, data, message):
    (tmp_path / "a.spz").write_bytes(data)
    with pytest.raises(InputError, match=message):
        spz.read(tmp_path / "a.spz")


@pytest.mark.row(66)
def test_a_bomb_takes_no_more_memory_than_its_header_says(tmp_path):
    head = struct.pack("<IIIBBBB", spz.MAGIC, 3, 5, 0, 12, 0, 0)
    (tmp_path / "a.spz").write_bytes(gzip.compress(head + bytes(64 << 20)))
    tracemalloc.start()
    spz.read(tmp_path / "a.spz")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.row(64)
def test_nan_is_refused():
    g = ordinary_set(7, 4)
    with pytest.raises(NumericalError, match="4 of 4"):
        spz.encode(Gaussians3D(g.means * float("nan"), g.quats, g.scales, g.opacities, g.sh))
    with pytest.raises(InputError, match="no Gaussians"):
        spz.encode(Gaussians3D(*(tensor[:0] for tensor in vars(g).values())))
