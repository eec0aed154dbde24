"""USD: usd-core reads the same motion, at half frames too, and finds nothing wrong."""

import os
import zipfile

import numpy as np
import pytest
from sets import assert_near, moving_set

from d2.errors import InputError, ResourceError
from d2.recon.formats import usd, usd_arrays, usd_reader
from d2.recon.formats.frames import FROM_WORLD, move

pxr = pytest.importorskip("pxr", reason="usd-core is not installed: pip install -e '.[usd]'")
from pxr import Usd, UsdGeom, UsdValidation, UsdVol  # noqa: E402

TIMES = np.linspace(0, 1, 5)
MODULES = {name: getattr(pxr, name) for name in ("Tf", "Usd", "UsdGeom", "UsdVol")}


def opened(path) -> tuple[Usd.Stage, UsdVol.ParticleField3DGaussianSplat]:
    stage = Usd.Stage.Open(str(path))
    return stage, UsdVol.ParticleField3DGaussianSplat(stage.GetDefaultPrim().GetChildren()[0])


@pytest.fixture
def at_once(monkeypatch):
    """Files of our own are read in this process."""

    def arrays(words, label):
        return usd_arrays.arrays(MODULES, words[0], "".join(words[1:]))

    monkeypatch.setattr(usd_reader, "_arrays", arrays)


def test_200_random_sets_come_back_as_float32(tmp_path, at_once):
    for seed in range(200):
        gaussians = moving_set(1 + seed % 9, seed % 4, seed)
        usd.write(gaussians, tmp_path / "a.usd", [0.25], 24)
        assert_near(usd_reader.read(tmp_path / "a.usd"), gaussians.at(0.25), mean=2e-6, rest=2e-6)


@pytest.mark.parametrize("suffix", [".usd", ".usda", ".usdz"])
def test_every_frame_and_positions_between_frames_are_those_of_the_source(tmp_path, suffix, at_once):
    gaussians = moving_set(20, 2)
    path = tmp_path / f"a{suffix}"
    usd.write(gaussians, path, TIMES, 12.0)
    assert os.listdir(tmp_path) == [path.name]
    for k, time in enumerate(TIMES):
        assert_near(usd_reader.read(path, 1 + k), gaussians.at(time), mean=2e-6, rest=2e-6)
    between = usd_reader.read(path, 2.5).means.numpy()
    np.testing.assert_allclose(between, gaussians.at(0.375).means, atol=2e-6)
    np.testing.assert_allclose(usd_reader.read(path).means, gaussians.at(0).means, atol=2e-6)


@pytest.mark.parametrize("suffix", [".usda", ".usdc", ".usdz"])
def test_damage_is_one_line_even_where_it_ends_usd_core(tmp_path, suffix):
    usd.write(moving_set(9, 1), tmp_path / f"a{suffix}", TIMES, 12.0)
    assert len(usd_reader.read(tmp_path / f"a{suffix}", 2.5)) == 9
    whole = (tmp_path / f"a{suffix}").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(4):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 30)] ^= 255
        (tmp_path / f"b{suffix}").write_bytes(damaged[: rng.integers(len(whole) // 2, len(whole) + 1)].tobytes())
        try:
            usd_reader.read(tmp_path / f"b{suffix}")
        except InputError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 2


def test_a_file_that_ends_usd_core_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.usd").write_bytes(b"x")
    killer = tmp_path / "killer.py"
    killer.write_text("import os\nos.abort()")
    monkeypatch.setattr(usd_arrays, "__file__", str(killer))
    with pytest.raises(InputError, match="usd-core ended with -6"):
        usd_reader.read(tmp_path / "a.usd")


def test_stage_says_how_it_plays_and_which_way_is_up(tmp_path):
    usd.write(moving_set(), tmp_path / "a.usd", TIMES, 12.0, up="z", name="walking panda")
    stage, splat = opened(tmp_path / "a.usd")
    assert (stage.GetStartTimeCode(), stage.GetEndTimeCode(), stage.GetTimeCodesPerSecond()) == (1, 5, 12)
    assert UsdGeom.GetStageUpAxis(stage) == "Z" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    assert stage.GetDefaultPrim().GetName() == "walking_panda"
    assert splat.GetPositionsAttr().GetNumTimeSamples() == 5 and splat.GetScalesAttr().GetNumTimeSamples() == 0
    np.testing.assert_allclose(splat.GetPositionsAttr().Get(1), moving_set().at(0).means, atol=1e-6)
    assert splat.GetPositionsAttr().Get() is not None and splat.GetExtentAttr().Get() is not None


@pytest.mark.parametrize("points", [False, True])
def test_validation_of_usd_finds_no_error(tmp_path, points):
    usd.write(moving_set(), tmp_path / "a.usd", TIMES, 24, points=points)
    context = UsdValidation.ValidationContext(UsdValidation.ValidationRegistry().GetOrLoadAllValidators())
    stage = Usd.Stage.Open(str(tmp_path / "a.usd"))
    assert [error.GetMessage() for error in context.Validate(stage)] == []


def test_points_move_too_and_have_widths_and_colours(tmp_path):
    gaussians = moving_set()
    usd.write(gaussians, tmp_path / "a.usd", TIMES, 24, points=True)
    stage = Usd.Stage.Open(str(tmp_path / "a.usd"))
    points = UsdGeom.Points(stage.GetDefaultPrim().GetChildren()[0])
    expected = move(gaussians, FROM_WORLD["rub"]).at(0.5).means
    np.testing.assert_allclose(points.GetPointsAttr().Get(3), expected, atol=1e-6)
    assert len(points.GetWidthsAttr().Get()) == len(gaussians) == len(points.GetDisplayColorAttr().Get())


def test_a_package_holds_one_crate_at_a_multiple_of_64_bytes(tmp_path):
    usd.write(moving_set(), tmp_path / "a.usdz", TIMES, 24, name="fox")
    with zipfile.ZipFile(tmp_path / "a.usdz") as package:
        (entry,) = package.infolist()
        assert entry.filename == "fox.usdc" and entry.compress_type == zipfile.ZIP_STORED


def test_what_is_no_splat_usd_is_refused_and_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.usd").write_bytes(b"x")
    for path in (tmp_path / "a.usd", tmp_path / "none.usd"):
        with pytest.raises(InputError):
            usd_reader.read(path)
    usd.write(moving_set(), tmp_path / "points.usd", [0.0], 24, points=True)
    with pytest.raises(InputError, match="holds no Particle"):
        usd_reader.read(tmp_path / "points.usd")
    before = sorted(os.listdir(tmp_path))

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match="No space"):
        usd.write(moving_set(), tmp_path / "b.usdz", TIMES, 24)
    assert sorted(os.listdir(tmp_path)) == before
