"""The 3DGS PLY: what is written, what is read back, what is refused."""

import json
import math
import os
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from d2 import fileio
from d2.errors import ConflictError, InputError, NumericalError, ResourceError
from d2.recon.formats import ply
from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.raster import sh


def random_set(seed: int) -> Gaussians3D:
    """Ordinary and extreme values within the stated bounds."""
    rng = np.random.default_rng(seed)
    count, degree = int(rng.integers(1, 40)), int(rng.integers(0, 4))
    means = rng.normal(size=(count, 3)) * 10 ** rng.uniform(-6, 6, (count, 1))
    scales = 10 ** rng.uniform(-12, 12, (count, 3))
    opacities = rng.choice([0, 1e-30, 1e-6, 0.5, 1 - 1e-6, 1, rng.random()], count)
    coefficients = rng.normal(size=(count, sh.bases(degree), 3)) * 10 ** rng.uniform(-3, 3)
    quats = rng.normal(size=(count, 4))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    arrays = (means, quats, scales, opacities, coefficients)
    return Gaussians3D(*(torch.from_numpy(array).float() for array in arrays))


def moving_set(count: int = 6, degree: int = 0, seed: int = 0) -> Gaussians4D:
    g = torch.Generator().manual_seed(seed)
    return Gaussians4D(
        means=torch.randn(count, 3, generator=g), velocities=torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g), log_durations=torch.randn(count, generator=g),
        quats=torch.randn(count, 4, generator=g), log_scales=torch.randn(count, 3, generator=g) - 3,
        opacity_logits=torch.randn(count, generator=g),
        sh=torch.randn(count, sh.bases(degree), 3, generator=g),
    )  # fmt: skip


def assert_same(got: Gaussians3D, expected: Gaussians3D) -> None:
    """The bounds of the format: float32 rounding, opacity within 4e-7, ln scale within 1e-5."""
    largest = expected.means.abs().amax(-1, keepdim=True)  # turning mixes a row's coordinates
    assert ((got.means - expected.means).abs() <= 2e-7 * largest).all()
    torch.testing.assert_close(got.scales.log(), expected.scales.log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.opacities, expected.opacities, atol=4e-7, rtol=0)
    assert ((got.sh - expected.sh).abs() <= 2e-6 * expected.sh.abs().amax((1, 2), keepdim=True)).all()
    same = (got.quats * expected.quats).sum(-1).abs()
    torch.testing.assert_close(same, torch.ones_like(same), atol=1e-6, rtol=0)


def header_of(data: bytes) -> list[str]:
    return data[: data.index(b"end_header\n") + 10].decode().split("\n")


def text_ply(rows: list[list[float]], names: list[str], form: str = "ascii", kind: str = "float") -> bytes:
    lines = [
        "ply",
        f"format {form} 1.0",
        f"element vertex {len(rows)}",
        *(f"property {kind} {n}" for n in names),
    ]
    body = "".join(" ".join(repr(value) for value in row) + "\n" for row in rows)
    return ("\n".join([*lines, "end_header"]) + "\n" + body).encode()


NAMES = [
    "x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
    "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
]  # fmt: skip
ROW = [1.0, 2.0, 3.0, 0.1, 0.2, 0.3, 0.0, -1.0, -2.0, -3.0, 1.0, 0.0, 0.0, 0.0]


# -- writing ---------------------------------------------------------------------------------------------


@pytest.mark.row(65)
def test_two_hundred_random_sets_come_back_within_the_stated_bounds(tmp_path):
    for seed in range(200):
        gaussians = random_set(seed)
        layout = ply.Layout(("rdf", "rub", "world")[seed % 3])
        (tmp_path / "a.ply").write_bytes(ply.encode(gaussians, layout))
        assert_same(ply.read(tmp_path / "a.ply"), gaussians)


def test_layout_is_the_one_every_tool_reads():
    for degree, size in ((0, 68), (1, 104), (2, 164), (3, 248)):
        gaussians = moving_set(3, degree).at(0.5)
        data = ply.encode(gaussians)
        lines = header_of(data)
        assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
        assert lines[-1] == "end_header" and b"\r" not in data[:200]
        names = [line.split()[2] for line in lines if line.startswith("property")]
        assert all(line.startswith("property float ") for line in lines if line.startswith("property"))
        rest = [f"f_rest_{k}" for k in range(3 * ((degree + 1) ** 2 - 1))]
        colour = ["f_dc_0", "f_dc_1", "f_dc_2", *rest]
        assert names == ["x", "y", "z", "nx", "ny", "nz", *colour, *NAMES[6:]]
        assert ply.Layout().bytes_per_gaussian(degree) == size
        assert len(data) == data.index(b"end_header\n") + 11 + 3 * size


def test_values_are_those_worked_out_by_hand():
    # World (1, 2, 3) is right 1, down -3, forward 2; colour 1, .5, 0; opacity .5 is logit 0.
    gaussians = Gaussians3D(
        torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, math.e, 0.5]]),
        torch.tensor([0.5]), sh.rgb_to_sh0(torch.tensor([[[1.0, 0.5, 0.0]]])),
    )  # fmt: skip
    data = ply.encode(gaussians)
    row = np.frombuffer(data[data.index(b"end_header\n") + 11 :], "<f4")
    half, dc = math.sqrt(0.5), 0.5 / 0.28209479177387814
    expected = [1, -3, 2, 0, 0, 0, dc, 0, -dc, 0, 0, 1, math.log(0.5), half, half, 0, 0]
    np.testing.assert_allclose(row, expected, atol=1e-6)


def test_rest_coefficients_are_written_channel_by_channel():
    gaussians = moving_set(2, 1).at(0.5)
    data = ply.encode(gaussians, ply.Layout("world"))
    table = np.frombuffer(data[data.index(b"end_header\n") + 11 :], "<f4").reshape(2, -1)
    np.testing.assert_array_equal(table[:, 9:12], gaussians.sh[:, 1:, 0])  # red
    np.testing.assert_array_equal(table[:, 15:18], gaussians.sh[:, 1:, 2])  # blue


def test_padding_to_degree_three_adds_zeros_in_the_right_places(tmp_path):
    gaussians = moving_set(4, 1).at(0.5)
    ply.write(gaussians, tmp_path / "a.ply", ply.Layout(pad_sh3=True))
    back = ply.read(tmp_path / "a.ply")
    assert back.sh_degree == 3 and not back.sh[:, 4:].any()
    torch.testing.assert_close(back.sh[:, :4], gaussians.sh, atol=1e-5, rtol=0)


@pytest.mark.row(64)
def test_extreme_values_are_clamped_and_never_written_as_infinity():
    base = moving_set(4).at(0.5)
    gaussians = Gaussians3D(
        base.means, torch.tensor([[0.0] * 4, [1e-30, 0, 0, 0], [3.0, 0, 0, 0], [1.0, 0, 0, 0]]),
        torch.tensor([[0.0, 1, 1], [math.inf, 1, 1], [1e-30, 1, 1], [1e30, 1, 1]]),
        torch.tensor([0.0, 1.0, 1e-38, 1 - 1e-7]), base.sh,
    )  # fmt: skip
    data = ply.encode(gaussians)
    table = np.frombuffer(data[data.index(b"end_header\n") + 11 :], "<f4").reshape(4, -1)
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table[:, 9], [-15, 15, -15, 15], atol=1e-5)
    np.testing.assert_allclose(table[:, 10], np.log([1e-12, 1e12, 1e-12, 1e12]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(table[:, 13:17], axis=1), 1, rtol=1e-6)


@pytest.mark.row(64)
@pytest.mark.parametrize("field", ["means", "quats", "scales", "opacities", "sh"])
def test_nan_is_refused_with_the_number_of_gaussians_and_the_column(field):
    tensors = dict(vars(moving_set().at(0.5)))
    tensors[field] = tensors[field].clone()
    tensors[field][2] = math.nan
    with pytest.raises(NumericalError, match="1 of 6 Gaussians are NaN or infinite"):
        ply.encode(Gaussians3D(**tensors))


@pytest.mark.row(53)
def test_pruning_leaves_out_the_faint_and_says_when_nothing_is_left(tmp_path):
    gaussians = moving_set(50).at(0.5)
    ply.write(gaussians, tmp_path / "a.ply", ply.Layout(prune_opacity=0.3))
    assert len(ply.read(tmp_path / "a.ply")) == int((gaussians.opacities >= 0.3).sum()) < 50
    with pytest.raises(InputError, match="nothing to write: no Gaussian has an opacity"):
        ply.encode(gaussians, ply.Layout(prune_opacity=0.999))
    empty = Gaussians3D(*(tensor[:0] for tensor in vars(gaussians).values()))
    with pytest.raises(InputError, match="there are no Gaussians"):
        ply.encode(empty)


@pytest.mark.parametrize("wrong", [{"frame": "xyz"}, {"prune_opacity": 1.0}, {"prune_opacity": math.nan}])
def test_a_layout_out_of_range_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ply.Layout(**wrong)


def test_comments_stay_one_ascii_line():
    lines = header_of(ply.encode(moving_set().at(0.5), comments=["one\nelement vertex 9 é"]))
    assert "comment one element vertex 9 ?" in lines


# -- sequences -------------------------------------------------------------------------------------------


def test_sequence_has_numbered_files_with_constant_order_and_a_manifest(tmp_path):
    gaussians, times = moving_set(), [0.0, 0.4, 1.0]
    folder = ply.write_sequence(gaussians, tmp_path / "ply", "fox", times, 24.0)
    assert sorted(os.listdir(folder)) == ["fox_0001.ply", "fox_0002.ply", "fox_0003.ply", "frames.json"]
    manifest = json.loads((folder / "frames.json").read_text())
    assert manifest["fps"] == 24.0
    assert manifest["frames"] == [{"file": f"fox_000{k + 1}.ply", "time": times[k]} for k in range(3)]
    for entry in manifest["frames"]:
        assert_same(ply.read(folder / entry["file"]), gaussians.at(entry["time"]))
    assert os.listdir(tmp_path) == ["ply"]


def test_an_existing_sequence_is_replaced_only_when_asked_and_a_foreign_folder_never(tmp_path):
    gaussians, folder = moving_set(), tmp_path / "ply"
    ply.write_sequence(gaussians, folder, "a", [0.0, 1.0], 24)
    with pytest.raises(ConflictError, match="exists; pass --overwrite"):
        ply.write_sequence(gaussians, folder, "b", [0.0], 24)
    ply.write_sequence(gaussians, folder, "b", [0.0], 24, overwrite=True)
    assert sorted(os.listdir(folder)) == ["b_0001.ply", "frames.json"]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(ConflictError, match="not a sequence that d2 wrote"):
        ply.write_sequence(gaussians, foreign, "b", [0.0], 24, overwrite=True)
    assert os.listdir(foreign) == ["letter.txt"]


def test_a_failure_half_way_leaves_the_old_sequence_and_nothing_else(tmp_path, monkeypatch):
    gaussians, folder = moving_set(), tmp_path / "ply"
    ply.write_sequence(gaussians, folder, "a", [0.0, 1.0], 24)
    before = {path.name: fileio.sha256(path) for path in folder.iterdir()}
    real, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ResourceError, match="Input/output error"):
        ply.write_sequence(gaussians, folder, "a", [0.0, 0.5, 1.0], 24, overwrite=True)
    assert {path.name: fileio.sha256(path) for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["ply"]


@pytest.mark.parametrize(
    ("name", "times", "fps", "message"),
    [
        ("a/b", [0.0], 24, "file name"), ("..", [0.0], 24, "file name"), ("", [0.0], 24, "file name"),
        ("-x", [0.0], 24, "file name"), ("a\n", [0.0], 24, "file name"),
        ("a", [], 24, "at least one time"), ("a", [1.5], 24, "in 0..1"), ("a", [math.nan], 24, "in 0..1"),
        ("a", [0.0], 0, "fps"), ("a", [0.0], math.nan, "fps"),
    ],
)  # fmt: skip
def test_a_sequence_refuses_names_times_and_rates_out_of_range(tmp_path, name, times, fps, message):
    with pytest.raises(InputError, match=message):
        ply.write_sequence(moving_set(), tmp_path / "ply", name, times, fps)
    assert not list(tmp_path.iterdir())


# -- reading ---------------------------------------------------------------------------------------------


@pytest.mark.row(63)
def test_ascii_big_endian_doubles_and_extra_properties_load(tmp_path):
    path = tmp_path / "a.ply"
    path.write_bytes(text_ply([ROW, ROW], NAMES))
    expected = ply.read(path, "world")
    assert expected.means.tolist() == [[1, 2, 3]] * 2
    names, row = [*NAMES, "red", "f_dc_9"], [*ROW, 7.0, 8.0]
    for form, kind, dtype in (
        ("binary_big_endian", "float", ">f4"),
        ("binary_little_endian", "double", "<f8"),
        ("binary_big_endian", "float64", ">f8"),
    ):
        header = text_ply([], names, form, kind).replace(b"vertex 0", b"vertex 2")
        path.write_bytes(header + np.array([row, row], dtype).tobytes())
        assert_same(ply.read(path, "world"), expected)
    path.write_bytes(text_ply([row, row], names).replace(b"\n", b"\r\n"))
    assert_same(ply.read(path, "world"), expected)


@pytest.mark.row(63)
def test_trailing_bytes_and_other_elements_do_no_harm(tmp_path):
    gaussians, path = moving_set().at(0.5), tmp_path / "a.ply"
    data = ply.encode(gaussians)
    path.write_bytes(data + b"left over")
    assert_same(ply.read(path), gaussians)
    extra = b"element camera 2\nproperty float f\nend_header\n"
    path.write_bytes(data.replace(b"end_header\n", extra) + bytes(8))
    assert_same(ply.read(path), gaussians)


@pytest.mark.row(64)
def test_rows_with_nan_infinity_or_no_rotation_are_dropped_and_counted(tmp_path):
    bad = [[*ROW[:k], value, *ROW[k + 1 :]] for k, value in ((0, math.nan), (6, math.inf), (7, -math.inf))]
    path = tmp_path / "a.ply"
    path.write_bytes(text_ply([ROW, *bad, [*ROW[:10], 0.0, 0.0, 0.0, 0.0], ROW], NAMES))
    with pytest.warns(UserWarning, match=r"a.ply: 4 of 6 Gaussians hold NaN.*dropped"):
        assert len(ply.read(path)) == 2
    heard = []
    ply.read(path, warn=heard.append)
    assert len(heard) == 1
    path.write_bytes(text_ply(bad, NAMES))
    with pytest.raises(InputError, match="all 3 Gaussians hold NaN"):
        ply.read(path)


@pytest.mark.row(64)
def test_a_number_beyond_float32_in_a_text_is_dropped_like_infinity(tmp_path):
    path, heard = tmp_path / "a.ply", []
    path.write_bytes(text_ply([ROW, [1e300, *ROW[1:]]], NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ply.read(path, warn=heard.append)) == 1
    assert "1 of 2" in heard[0]


def test_scales_beyond_float32_come_back_positive_and_finite(tmp_path):
    row = [*ROW[:7], -1e4, 1e4, 0.0, *ROW[10:]]
    (tmp_path / "a.ply").write_bytes(text_ply([row], NAMES))
    scales = ply.read(tmp_path / "a.ply").scales
    torch.testing.assert_close(scales, torch.tensor([[1e-12, 1e12, 1.0]]))


def test_frame_comes_from_the_argument_then_the_comment_then_custom(tmp_path):
    path = tmp_path / "a.ply"
    path.write_bytes(text_ply([ROW], NAMES))
    assert ply.read(path).means.tolist() == [[1, 3, -2]]  # rdf: right, down, forward -> x, -z, y
    assert ply.read(path, "rub").means.tolist() == [[1, -3, 2]]
    path.write_bytes(text_ply([ROW], NAMES).replace(b"element", b"comment frame world\nelement"))
    assert ply.read(path).means.tolist() == [[1, 2, 3]]


def wrong_files() -> dict[str, tuple[bytes, str]]:
    good = text_ply([ROW], NAMES)
    binary = ply.encode(moving_set().at(0.5))
    ones = [*NAMES, *(f"f_rest_{k}" for k in range(10))]
    long = b"comment " + b"x" * (1 << 20) + b"\nelement"
    return {
        "more Gaussians than memory": (binary.replace(b"vertex 6", b"vertex " + b"9" * 12), "999999999999 v"),
        "more Gaussians than bytes": (binary.replace(b"vertex 6", b"vertex 40000000"), "truncated"),
        "more text than bytes": (good.replace(b"vertex 1", b"vertex 40000000"), "truncated"),
        "negative count": (good.replace(b"vertex 1", b"vertex -1"), "element vertex -1"),
        "no Gaussians": (good.replace(b"vertex 1", b"vertex 0"), "0 vertices"),
        "no vertex element": (good.replace(b"vertex 1", b"face 1"), "no vertices"),
        "another empty element": (good.replace(b"end_header", b"element a 1\nend_header"), "empty"),
        "missing rotation": (good.replace(b"property float rot_3\n", b""), "rot_3 missing"),
        "ten f_rest": (text_ply([ROW + [0.0] * 10], ones), "10 f_rest"),
        "gap in f_rest": (text_ply([ROW + [0.0] * 9], [*ones[:-2], "f_rest_x"]), "f_rest"),
        "list property": (good.replace(b"float rot_3", b"list uchar int rot_3"), "list"),
        "same property twice": (good.replace(b"float rot_3", b"float rot_2"), "rot_2"),
        "unknown type": (good.replace(b"float rot_3", b"half rot_3"), "half"),
        "no format": (good.replace(b"format ascii 1.0\n", b""), "names no format"),
        "unknown format": (good.replace(b"ascii", b"utf8"), "utf8"),
        "text cut short": (good[:-6], "not a readable PLY"),
        "words instead of numbers": (good.replace(b"3.0", b"abc"), "not a readable PLY"),
        "binary cut short": (binary[:-1], "truncated"),
        "header without end": (good.replace(b"end_header", b"comment x"), "no header"),
        "header of a megabyte": (good.replace(b"element", long), "64 KiB"),
        "header with umlauts": (good.replace(b"element", "comment ä\nelement".encode()), "not ASCII"),
        "no PLY": (b"\x89PNG\r\n\x1a\n", "not a PLY"),
        "empty": (b"", "not a PLY"),
    }  # fmt: skip


@pytest.mark.row(63)
@pytest.mark.parametrize("fault", list(wrong_files()))
def test_a_wrong_file_is_refused_in_one_line_before_memory_is_taken(tmp_path, fault):
    data, message = wrong_files()[fault]
    path = tmp_path / "a b.ply"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            ply.read(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert "'" + str(path) + "'" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_readable_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.ply")
    for name, message in (
        ("none.ply", "does not exist"),
        ("pipe.ply", "not a regular"),
        (".", "not a regular"),
    ):
        with pytest.raises(InputError, match=message):
            ply.read(tmp_path / name)
