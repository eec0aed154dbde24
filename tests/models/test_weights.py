import io
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2.errors import SetupError
from d2.fileio import atomic_write, write_tensors
from d2.models.unet import UNetConfig
from d2.models.weights import DTYPES, PREFIX, SV3D, SVD, check, find, layout, leftovers, load, read_header

OFFICIAL = {"svd_xt": (SVD, 2446, 2389819785), "sv3d_p": (SV3D, 2212, 2342222549)}


def tensors_of(spec, dtype=torch.float32):
    shapes = layout(spec) | leftovers(spec)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.safetensors"


def refusal(path, spec):
    """The message of the refusal: one line that names the file."""
    with pytest.raises(SetupError) as caught:
        load(path, spec, "unet")
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert path.name in message
    return message


def set_header(path, change):
    """Rewrites the header of a file with `change` applied; the tensors' bytes stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    atomic_write(path, len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_layout_equals_the_official_key_list_name_and_shape(shared, name):
    spec, count, parameters = OFFICIAL[name]
    official = json.loads((shared / "checkpoints" / f"{name}_keys.json").read_text())
    ours = {key: list(shape) for key, shape in (layout(spec) | leftovers(spec)).items()}
    assert ours == official
    assert len(official) == count
    assert sum(torch.Size(shape).numel() for shape in official.values()) == parameters


def test_the_two_unets_differ_in_one_tensor_only():
    svd, sv3d = ({k: v for k, v in layout(s).items() if k.startswith(PREFIX["unet"])} for s in (SVD, SV3D))
    assert {k for k in svd if svd[k] != sv3d[k]} == {"model.diffusion_model.label_emb.0.0.weight"}
    assert svd.keys() == sv3d.keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size_files_are_checked_by_their_header(tmp_path, sparse, dtype):
    for spec, count, _ in OFFICIAL.values():
        file = sparse(tmp_path / spec.filename, spec, dtype)
        layout.cache_clear()
        leftovers.cache_clear()
        start = time.process_time()
        assert len(check(file, spec)) == count
        assert time.process_time() - start < 5  # about half a second here; reading the tensors would take minutes


def test_a_full_size_float_file_has_the_official_length(tmp_path, sparse):
    tensor_bytes = {"svd_xt": 4 * 2389819785, "sv3d_p": 4 * 2342222549}
    for spec, _, _ in OFFICIAL.values():
        assert 0 < sparse(tmp_path / spec.filename, spec, "F32").stat().st_size - tensor_bytes[spec.name] < 1 << 20


@pytest.mark.row(27)
def test_swapped_models_are_named(tmp_path, sparse):
    file = sparse(tmp_path / "svd_xt.safetensors", SV3D, "BF16")
    with pytest.raises(SetupError, match="is sv3d_p, not svd_xt"):
        check(file, SVD)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", PREFIX)
def test_every_part_loads_from_every_precision(path, spec, part, stored):
    tensors = tensors_of(spec, stored)
    write_tensors(path, tensors)
    module = load(path, spec, part, torch.bfloat16)
    for name, value in module.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, tensors[PREFIX[part] + name].to(torch.bfloat16)), name
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_a_file_in_its_own_precision_loads_bit_by_bit(path, spec):
    tensors = tensors_of(spec)
    write_tensors(path, tensors)
    for name, value in load(path, spec, "conditioner").state_dict().items():
        assert torch.equal(value, tensors[PREFIX["conditioner"] + name])


@pytest.mark.row(27)
def test_one_missing_tensor_is_refused_and_named(path, spec):
    for name in ("model.diffusion_model.out.2.bias", *list(leftovers(spec))[:2]):
        tensors = tensors_of(spec)
        del tensors[name]
        write_tensors(path, tensors)
        assert f"1 tensor missing: {name}" in refusal(path, spec)


def test_leftovers_may_be_absent_together(path, spec):
    write_tensors(path, {k: v for k, v in tensors_of(spec).items() if k in layout(spec)})
    load(path, spec, "conditioner")


@pytest.mark.row(27)
def test_extra_tensors_are_refused_the_first_three_named(path, spec):
    extra = {f"extra.{i}": torch.zeros(1) for i in range(5)}
    write_tensors(path, tensors_of(spec) | extra)
    assert "5 tensors not part of it: extra.0, extra.1, extra.2, ..." in refusal(path, spec)


@pytest.mark.row(27)
def test_a_wrong_shape_is_refused_with_both_shapes(path, spec):
    name = "model.diffusion_model.out.2.bias"
    write_tensors(path, tensors_of(spec) | {name: torch.zeros(5)})
    assert f"{name} (expected [4], got [5])" in refusal(path, spec)


@pytest.mark.row(27)
def test_whole_numbers_are_refused_and_named(path, spec):
    name = "model.diffusion_model.out.2.bias"
    write_tensors(path, tensors_of(spec) | {name: torch.zeros(4, dtype=torch.int8)})
    message = refusal(path, spec)
    assert name in message
    assert "I8" in message


@pytest.mark.row(29)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_its_tensor_named(path, spec, value):
    name = "model.diffusion_model.out.2.bias"
    tensors = tensors_of(spec)
    tensors[name][2] = value
    write_tensors(path, tensors)
    assert name in refusal(path, spec)


def test_a_value_too_large_for_the_wanted_precision_is_refused(path, spec):
    tensors = tensors_of(spec)
    tensors["model.diffusion_model.out.2.bias"][2] = 1e6
    write_tensors(path, tensors)
    load(path, spec, "unet")
    with pytest.raises(SetupError, match="float16"):
        load(path, spec, "unet", torch.float16)


@pytest.mark.row(26)
def test_truncated_and_lengthened_files_are_refused(path, spec):
    write_tensors(path, tensors_of(spec))
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100, 8, 7, 0):
        path.write_bytes(data[:length])
        assert refusal(path, spec)
    path.write_bytes(data + b"\0")
    assert "followed by something else" in refusal(path, spec)


def pickled() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return buffer.getvalue()


@pytest.mark.row(26)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:b2652c\nsize 9559625980\n",
            "Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "HTML page"),
        (pickled(), "pickled PyTorch file"),
        (b"\x80\x02}q\x00.", "pickled PyTorch file"),
        (b"", "is empty"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (b"\2\0\0\0\0\0\0\0[]", "not a valid safetensors file"),
        (b"\2\0\0\0\0\0\0\0{}", "not tiny"),
    ],
)
def test_what_is_no_checkpoint_is_recognised(path, spec, content, words):
    path.write_bytes(content)
    assert words in refusal(path, spec)


@pytest.mark.row(26)
def test_nonsense_in_the_header_is_refused_before_anything_is_allocated(path, spec):
    name = "model.diffusion_model.out.2.bias"
    changes = [
        lambda h: h[name].update(shape=[1 << 62, 1 << 62]),
        lambda h: h[name].update(shape=[-4]),
        lambda h: h[name].update(shape=[4.0]),
        lambda h: h[name].update(shape="4"),
        lambda h: h[name].update(shape=[True, 4]),
        lambda h: h[name].update(data_offsets=[0, 16]),
        lambda h: h[name].update(data_offsets=[0]),
        lambda h: h[name].update(shape=[1 << 62] * 100_000),
        lambda h: h[name].update(dtype=["F32"]),
        lambda h: h.update({name: 3}),
    ]
    for change in changes:
        write_tensors(path, tensors_of(spec))
        set_header(path, change)
        assert "not a valid safetensors file" in refusal(path, spec)


MEASURE = """
import resource, sys, time
from pathlib import Path
import torch
from d2.errors import SetupError
from d2.models.unet import UNetConfig
from d2.models.weights import SVD, check, load, layout, leftovers
from dataclasses import replace

spec = replace(SVD, name="mid", unet=UNetConfig(model_channels=64, channel_mult=(1, 2, 4)))
layout(spec), leftovers(spec)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

before = peak()
unet = load(Path(sys.argv[1]) / "mid.safetensors", spec, "unet", torch.bfloat16)
wanted = sum(p.numel() * p.element_size() for p in unet.parameters()) / 2**20
print("good", peak() - before, wanted)
for path in sorted(Path(sys.argv[1]).glob("bad*")):
    before, start = peak(), time.process_time()
    try:
        check(path, spec)
    except SetupError as error:
        print("bad", peak() - before, time.process_time() - start)
"""


@pytest.mark.row(26)
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_bad_headers_cost_little_and_loading_needs_the_model_and_one_tensor(tmp_path, sparse):
    def write(name, text):
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)

    (tmp_path / "bad0").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    write("bad1", b"[" * (7 << 20))
    write("bad2", b'{"a":{"dtype":"F32","shape":[' + b"9" * (1 << 20) + b'],"data_offsets":[0,4]}}')
    many = [f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000)]
    write("bad3", f"{{{','.join(many)}}}".encode())
    spec = replace(SVD, name="mid", unet=UNetConfig(model_channels=64, channel_mult=(1, 2, 4)))
    sparse(tmp_path / "mid.safetensors", spec, "F32")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    good, *bad = (line.split() for line in done.stdout.splitlines())
    assert len(bad) == 4
    for _, megabytes, seconds in bad:
        assert float(megabytes) < 256
        assert float(seconds) < 5
    _, grown, wanted = good
    assert float(wanted) > 90
    assert float(grown) < float(wanted) + 50  # a float32 copy of the whole would be twice that


def test_the_same_name_twice_is_refused(path, spec):
    entry = '"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    text = f"{{{entry}, {entry}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "stands twice" in refusal(path, spec)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_never_anything_else(path, data):
    write_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(3, 2)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_header(path)
    except SetupError as error:
        assert path.name in str(error)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, spec):
    assert "not a file" in refusal(tmp_path, spec)


@pytest.mark.row(24)
def test_missing_weights_say_which_file_from_where_and_how(tmp_path, monkeypatch):
    with pytest.raises(SetupError) as caught:
        find(SVD, tmp_path)
    message = str(caught.value)
    for words in (str(tmp_path / "svd_xt.safetensors"), SVD.repository, "licence", "hf download"):
        assert words in message
    monkeypatch.setenv("D2_WEIGHTS", str(tmp_path / "elsewhere"))
    with pytest.raises(SetupError, match="elsewhere"):
        find(SV3D)


def test_weights_are_found_in_the_folder_the_environment_or_the_default(tmp_path, monkeypatch):
    for folder in ("given", "environment", "checkpoints"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / SVD.filename).touch()
    monkeypatch.chdir(tmp_path)
    assert find(SVD).parent.name == "checkpoints"
    monkeypatch.setenv("D2_WEIGHTS", str(tmp_path / "environment"))
    assert find(SVD).parent.name == "environment"
    assert find(SVD, tmp_path / "given").parent.name == "given"
