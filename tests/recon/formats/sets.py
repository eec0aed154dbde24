"""Random sets of Gaussians, bounds on what a format keeps, and the readers of others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData
from torch import Tensor

from d2.recon.gaussians import Gaussians3D, Gaussians4D
from d2.recon.raster import sh
from d2.recon.raster.reference import rotation_matrices

PACKAGE = "node_modules/@playcanvas/splat-transform"


def ordinary_set(seed: int, count: int | None = None, degree: int | None = None) -> Gaussians3D:
    """An object of about unit size, as a reconstruction makes them, with some values at the limits."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40)) if count is None else count
    degree = int(rng.integers(0, 4)) if degree is None else degree
    quats = rng.normal(size=(count, 4))
    arrays = (
        rng.normal(size=(count, 3)),
        quats / np.linalg.norm(quats, axis=1, keepdims=True),
        np.exp(rng.uniform(-9, 2, (count, 3))),
        rng.choice([0, 1, 0.5, rng.random()], count),
        0.3 * rng.normal(size=(count, sh.bases(degree), 3)).clip(-1.5, 1.5),
    )
    return Gaussians3D(*(torch.from_numpy(array).float() for array in arrays))


def moving_set(count: int = 12, degree: int = 1, seed: int = 0) -> Gaussians4D:
    g = torch.Generator().manual_seed(seed)
    return Gaussians4D(
        means=0.4 * torch.randn(count, 3, generator=g), velocities=0.3 * torch.randn(count, 3, generator=g),
        times=torch.rand(count, generator=g), log_durations=torch.log(0.2 + torch.rand(count, generator=g)),
        quats=torch.randn(count, 4, generator=g), log_scales=0.4 * torch.randn(count, 3, generator=g) - 2.5,
        opacity_logits=torch.randn(count, generator=g) + 1,
        sh=0.3 * torch.randn(count, sh.bases(degree), 3, generator=g),
    )  # fmt: skip


def assert_near(
    got: Gaussians3D,
    expected: Gaussians3D,
    *,
    mean: float = 1e-6,
    log_scale: float = 1e-5,
    opacity: float = 1e-6,
    dc: float = 1e-6,
    rest: float = 1e-6,
    turn: float = 4e-6,  # 1 - |cos| between axes; half a turn about one of them is the same Gaussian
) -> None:
    """Absolute bounds on what came back."""

    def within(a: Tensor, b: Tensor, bound: float, what: str) -> None:
        worst = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        assert worst <= bound, f"{what}: {worst:.3g} > {bound:.3g}"

    assert got.sh.shape == expected.sh.shape
    within(got.means, expected.means, mean, "means")
    within(got.scales.log(), expected.scales.log(), log_scale, "ln scales")
    within(got.opacities, expected.opacities, opacity, "opacities")
    within(got.sh[:, 0], expected.sh[:, 0], dc, "degree 0")
    within(got.sh[:, 1:], expected.sh[:, 1:], rest, "higher degrees")
    axes = rotation_matrices(got.quats.double()), rotation_matrices(expected.quats.double())
    assert float(1 - (axes[0] * axes[1]).sum(-2).abs().min()) <= turn


def splat_transform() -> list[str]:
    """The command of @playcanvas/splat-transform, or a skip that says where it is looked for."""
    named = os.environ.get("D2_SPLAT_TRANSFORM")
    if named:
        return ["node", named] if named.endswith((".js", ".mjs")) else [named]
    if shutil.which("splat-transform"):
        return ["splat-transform"]
    node, npm = shutil.which("node"), shutil.which("npm")
    folders = [Path.cwd(), Path(__file__).parents[3]]
    if npm:
        root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, timeout=20, check=False)
        folders.append(Path(root.stdout.strip() or "/").parent)
    for folder in folders:
        script = folder / PACKAGE / "bin" / "cli.mjs"
        if node and script.is_file():
            return [node, str(script)]
    pytest.skip(f"no splat-transform: not in $D2_SPLAT_TRANSFORM, on the PATH, in ./{PACKAGE} or npm's global folder")


def through_splat_transform(path: Path) -> Gaussians3D:
    """What that program reads in `path`, handed back through a PLY of its own and plyfile; in the PLY's axes."""
    out = path.with_name(path.stem + "_read.ply")
    call = [*splat_transform(), "-q", "-w", "-g", "cpu", str(path), str(out)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    vertex = PlyData.read(str(out))["vertex"].data

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(vertex[name], np.float32) for name in names], -1))

    rest = [name for name in vertex.dtype.names or () if name.startswith("f_rest_")]
    dc = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    bands = columns(*(f"f_rest_{k}" for k in range(len(rest)))).reshape(len(dc), 3, -1).mT if rest else dc[:, :0]
    return Gaussians3D(
        columns("x", "y", "z"),
        torch.nn.functional.normalize(columns("rot_0", "rot_1", "rot_2", "rot_3"), dim=-1),
        columns("scale_0", "scale_1", "scale_2").exp(),
        columns("opacity")[:, 0].sigmoid(),
        torch.cat([dc, bands], 1),
    )
