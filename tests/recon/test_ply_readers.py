"""Our PLY files mean the same to readers that others wrote."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData

from d2.recon.formats import ply
from d2.recon.formats.frames import to_frame
from d2.recon.gaussians import Gaussians3D
from d2.recon.raster import sh

COUNT = 300
PACKAGE = "node_modules/@playcanvas/splat-transform"


@pytest.fixture(params=[0, 1, 2, 3])
def gaussians(request) -> Gaussians3D:
    generator = torch.Generator().manual_seed(request.param)
    return Gaussians3D(
        means=torch.randn(COUNT, 3, generator=generator),
        quats=torch.nn.functional.normalize(torch.randn(COUNT, 4, generator=generator), dim=-1),
        scales=torch.exp(torch.randn(COUNT, 3, generator=generator) - 4),
        opacities=torch.rand(COUNT, generator=generator),
        sh=torch.randn(COUNT, sh.bases(request.param), 3, generator=generator),
    )


def splat_transform() -> list[str]:
    """The command of @playcanvas/splat-transform, or a skip that says where it is looked for."""
    named = os.environ.get("D2_SPLAT_TRANSFORM")
    if named:
        return ["node", named] if named.endswith((".js", ".mjs")) else [named]
    if shutil.which("splat-transform"):
        return ["splat-transform"]
    node, npm = shutil.which("node"), shutil.which("npm")
    folders = [Path.cwd(), Path(__file__).parents[2]]
    if npm:
        root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, timeout=20, check=False)
        folders.append(Path(root.stdout.strip() or "/").parent)
    for folder in folders:
        script = folder / PACKAGE / "bin" / "cli.mjs"
        if node and script.is_file():
            return [node, str(script)]
    pytest.skip(f"no splat-transform: not in $D2_SPLAT_TRANSFORM, on the PATH, in ./{PACKAGE} or npm's global folder")


def assert_agree(raw: dict[str, np.ndarray], gaussians: Gaussians3D) -> None:
    """Raw values of another reader against the Gaussians in the file's frame, within float32 rounding."""
    expected = to_frame(gaussians, "rdf")
    np.testing.assert_allclose(raw["means"], expected.means, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.exp(raw["log_scales"]), expected.scales, rtol=2e-6)
    same = np.abs((raw["quats"] * expected.quats.numpy()).sum(1)) / np.linalg.norm(raw["quats"], axis=1)
    np.testing.assert_allclose(same, 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-raw["logits"])), expected.opacities, rtol=0, atol=1e-6)
    np.testing.assert_allclose(raw["sh"], expected.sh, rtol=0, atol=1e-5)


def test_gsply_reads_the_values_that_were_written(tmp_path, gaussians):
    gsply = pytest.importorskip("gsply", reason="gsply is not installed: pip install -e '.[dev]'")
    ply.write(gaussians, tmp_path / "a.ply")
    data = gsply.plyread(str(tmp_path / "a.ply"))
    rest = data.shN if data.shN is not None and data.shN.size else np.empty((COUNT, 0, 3), np.float32)
    coefficients = np.concatenate([data.sh0[:, None], rest], 1)
    raw = {"means": data.means, "log_scales": data.scales, "quats": data.quats, "logits": data.opacities}
    assert_agree(raw | {"sh": coefficients}, gaussians)


def test_splat_transform_reads_and_rewrites_the_values_that_were_written(tmp_path, gaussians):
    command = splat_transform()
    ply.write(gaussians, tmp_path / "in.ply")
    call = [*command, "-q", "-w", "-g", "cpu", str(tmp_path / "in.ply"), str(tmp_path / "out.ply")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    vertex = PlyData.read(str(tmp_path / "out.ply"))["vertex"].data

    def columns(*names: str) -> np.ndarray:
        return np.stack([np.asarray(vertex[name]) for name in names], -1)

    rest = columns(*(f"f_rest_{k}" for k in range(3 * (gaussians.sh.shape[1] - 1)))) if gaussians.sh_degree else None
    channels = np.empty((COUNT, 3, 0)) if rest is None else rest.reshape(COUNT, 3, -1)
    dc = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    raw = {
        "means": columns("x", "y", "z"),
        "log_scales": columns("scale_0", "scale_1", "scale_2"),
        "quats": columns("rot_0", "rot_1", "rot_2", "rot_3"),
        "logits": vertex["opacity"],
        "sh": np.concatenate([dc, channels.transpose(0, 2, 1)], 1),
    }
    assert_agree(raw, gaussians)
