"""GLB: what survives, what other programs read, what is refused."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from sets import assert_near, ordinary_set

from d2.errors import InputError
from d2.recon.formats import glb, mesh_glb
from d2.recon.formats.frames import to_frame
from d2.recon.mesh import Mesh

VALIDATE = """
const {validateBytes} = require(process.argv[1]);
validateBytes(new Uint8Array(require("fs").readFileSync(process.argv[2]))).then(r => console.log(JSON.stringify(r)));
"""


def validator() -> list[str]:
    """node and the folder of the npm package gltf-validator, or a skip."""
    node = shutil.which("node")
    named = os.environ.get("D2_GLTF_VALIDATOR")
    folders = [Path(named)] if named else [Path.cwd() / "node_modules/gltf-validator"]
    if not node or not folders[0].is_dir():
        pytest.skip("no gltf-validator: neither $D2_GLTF_VALIDATOR nor ./node_modules/gltf-validator is its folder")
    return [node, "-e", VALIDATE, str(folders[0].resolve())]


def test_200_random_sets_come_back_as_float32(tmp_path):
    for seed in range(200):
        gaussians = ordinary_set(seed)
        glb.write(gaussians, tmp_path / "a.glb")
        assert_near(glb.read(tmp_path / "a.glb"), gaussians, mean=2e-6, rest=2e-6)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_fourdgs_reads_the_values_that_were_written(tmp_path, degree):
    fourdgs = pytest.importorskip("fourdgs", reason="fourdgs is not installed: pip install -e '.[fourdgs]'")
    gaussians = ordinary_set(degree, 50, degree)
    glb.write(gaussians, tmp_path / "a.glb")
    found, expected = fourdgs.from_gltf(str(tmp_path / "a.glb")).gaussians, to_frame(gaussians, "rub")
    np.testing.assert_allclose(found.positions, expected.means, atol=1e-6)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-6)
    np.testing.assert_allclose(found.colors[:, 3], expected.opacities, atol=1e-6)
    same = np.abs((found.rotations[:, [3, 0, 1, 2]] * expected.quats.numpy()).sum(1))
    np.testing.assert_allclose(same, 1, atol=1e-6)
    rgb = 0.5 + 0.28209479177387814 * expected.sh[:, 0].numpy()
    np.testing.assert_allclose(found.colors[:, :3], rgb, atol=1e-5)
    assert found.sh_degree == degree


def test_validator_finds_no_error_beyond_the_extension(tmp_path):
    call = validator()
    glb.write(ordinary_set(1, 50, 3), tmp_path / "a.glb")
    done = subprocess.run([*call, str(tmp_path / "a.glb")], capture_output=True, text=True, timeout=60, check=True)
    errors = [issue for issue in json.loads(done.stdout)["issues"]["messages"] if issue["severity"] == 0]
    assert [error for error in errors if glb.EXTENSION not in error["pointer"]] == []  # which it does not know


def falling_triangle(frames: int) -> list[Mesh]:
    corners, colors = np.eye(3), np.full((3, 3), 0.5)
    triangles, fall = np.array([[0, 1, 2]], np.int32), np.array([[0, -1.0, 0]])
    return [Mesh(corners + k * fall, triangles, colors, np.tile(fall, (3, 1))) for k in range(frames)]


def test_validator_finds_nothing_wrong_with_morph_targets(tmp_path):
    call = validator()
    for frames in (1, 4):
        (tmp_path / "a.glb").write_bytes(mesh_glb.encode(falling_triangle(frames), 12.0))
        done = subprocess.run([*call, str(tmp_path / "a.glb")], capture_output=True, text=True, timeout=60, check=True)
        assert [issue for issue in json.loads(done.stdout)["issues"]["messages"] if issue["severity"] < 2] == []


def test_weights_of_morph_targets_play_one_frame_after_the_other():
    """Frame k is at k / fps seconds; halfway between two frames both have half the weight."""
    document, binary = glb.unpack(mesh_glb.encode(falling_triangle(4), 12.0), "a")

    def values(index: int) -> np.ndarray:
        accessor = document["accessors"][index]
        offset = document["bufferViews"][accessor["bufferView"]]["byteOffset"]
        width = {"SCALAR": 1, "VEC3": 3}[accessor["type"]]
        return np.frombuffer(binary, "<f4", accessor["count"] * width, offset).reshape(-1, width)

    (primitive,), (animation,) = document["meshes"][0]["primitives"], document["animations"]
    base = values(primitive["attributes"]["POSITION"])
    targets = np.stack([values(target["POSITION"]) for target in primitive["targets"]])
    (sampler,) = animation["samplers"]
    seconds, weights = values(sampler["input"])[:, 0], values(sampler["output"]).reshape(4, 3)
    np.testing.assert_allclose(seconds, np.arange(4) / 12, rtol=1e-6)
    for time in (0, 0.5, 1.75, 3):
        now = [np.interp(time / 12, seconds, weights[:, k]) for k in range(3)]
        np.testing.assert_allclose(base + np.tensordot(now, targets, 1), np.eye(3) - [0, time, 0], atol=1e-5)


def test_points_have_a_linear_colour_for_viewers_without_the_extension():
    gaussians = ordinary_set(1, 3, 0)
    document, binary = glb.unpack(glb.encode(gaussians), "a")
    names = document["meshes"][0]["primitives"][0]["attributes"]
    view = document["bufferViews"][document["accessors"][names["COLOR_0"]]["bufferView"]]
    color = np.frombuffer(binary, "<f4", 12, view["byteOffset"]).reshape(3, 4)
    srgb = (0.5 + 0.28209479177387814 * gaussians.sh[:, 0].numpy()).clip(0, 1)
    back = np.where(color[:, :3] <= 0.0031308, color[:, :3] * 12.92, 1.055 * color[:, :3] ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(back, srgb, atol=1e-5)


def test_what_is_no_splat_glb_is_refused(tmp_path):
    good = glb.encode(ordinary_set(2, 4, 1))
    document, binary = glb.unpack(good, "a")

    def changed(**changes: object) -> bytes:
        return glb.pack(document | changes, binary)

    accessors = [dict(accessor) for accessor in document["accessors"]]
    accessors[0]["count"] = 1 << 40
    cases = [
        (b"", "not a GLB"), (b"glTF" + bytes(40), "not a GLB"), (good[:100], "truncated"), (good[:-8], "truncated"),
        (changed(meshes=[]), "no Gaussians"), (changed(accessors=accessors), "leaves the buffer"),
        (changed(accessors=[]), "no Gaussians"), (changed(nodes=[{"mesh": 0, "scale": [2, 2, 2]}]), "transformed"),
        (glb.pack(document, b""), "leaves the buffer"), (glb.pack([], b""), "object"),
        (struct.pack("<IIIII", 0x46546C67, 2, 40, 1 << 31, 0x4E4F534A), "truncated"),
    ]  # fmt: skip
    for data, message in cases:
        (tmp_path / "a.glb").write_bytes(data)
        with pytest.raises(InputError, match=message):
            glb.read(tmp_path / "a.glb")


def test_mutations_give_input_errors_and_nothing_else(tmp_path):
    good, rng = glb.encode(ordinary_set(3, 3, 0)), np.random.default_rng(0)
    for k in range(300):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        (tmp_path / "a.glb").write_bytes(data[: int(rng.integers(1, len(data)))] if k % 3 == 0 else data)
        with contextlib.suppress(InputError):
            assert torch.isfinite(
                glb.read(
                    tmp_path / "a.glb",
                ).means
            ).all()
