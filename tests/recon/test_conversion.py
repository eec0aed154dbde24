"""`d2 convert` and `d2 info`, and pictures of what every format gives back."""

import json
import math

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from d2.cli.convert import convert as convert_command
from d2.cli.info import info as info_command
from d2.errors import ConflictError, InputError
from d2.recon import drawing
from d2.recon.conversion import READERS, SOURCES, convert, describe
from d2.recon.formats import ply
from d2.recon.gaussians import Gaussians3D, Gaussians4D

LEAST_DB = {".ply": 45, ".glb": 45, ".usd": 45, ".spz": 38, ".splat": 38}


@pytest.fixture
def moment() -> Gaussians3D:
    g, count = torch.Generator().manual_seed(0), 400
    return Gaussians3D(
        means=0.3 * torch.randn(count, 3, generator=g),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=-1),
        scales=torch.exp(0.3 * torch.randn(count, 3, generator=g) - 3),
        opacities=torch.rand(count, generator=g),
        sh=0.5 * torch.randn(count, 1, 3, generator=g),
    )


def picture(gaussians: Gaussians3D) -> np.ndarray:
    rig = drawing.orbit_rig(1.0, np.array([0.7]), 128, 128)
    (image,) = drawing.render_views(gaussians, rig.c2w, rig.K, 128, 128, [0.0], drawing.WHITE)
    return image[..., :3]


@pytest.mark.parametrize("suffix", LEAST_DB)
def test_pictures_of_what_comes_back_agree_with_the_source(tmp_path, moment, suffix):
    if suffix == ".usd":
        pytest.importorskip("pxr", reason="usd-core is not installed: pip install -e '.[usd]'")
    ply.write(moment, tmp_path / "a.ply")
    convert(tmp_path / "a.ply", tmp_path / f"b{suffix}")
    error = np.mean((picture(READERS[suffix](tmp_path / f"b{suffix}")) - picture(moment)) ** 2)
    assert -10 * math.log10(max(error, 1e-12)) >= LEAST_DB[suffix]


@pytest.mark.parametrize("first", SOURCES)
@pytest.mark.parametrize("second", SOURCES)
def test_every_pair_converts_and_keeps_the_places(tmp_path, moment, first, second):
    ply.write(moment, tmp_path / "a.ply")
    convert(tmp_path / "a.ply", tmp_path / f"b{first}")
    convert(tmp_path / f"b{first}", tmp_path / f"c{second}")
    found = READERS[second](tmp_path / f"c{second}").means
    assert torch.cdist(found, moment.means).amin(1).max() < 5e-4


def test_wrong_conversions_are_refused_and_nothing_is_replaced(tmp_path, moment):
    ply.write(moment, tmp_path / "a.ply")
    (tmp_path / "b.spz").write_bytes(b"mine")
    for source, target, error in (
        ("a.ply", "b.obj", InputError), ("a.glb", "c.ply", InputError), ("none.ply", "c.spz", InputError),
        ("a.ply", "b.spz", ConflictError), ("b.spz", "c.ply", InputError),
    ):  # fmt: skip
        with pytest.raises(error):
            convert(tmp_path / source, tmp_path / target)
    assert (tmp_path / "b.spz").read_bytes() == b"mine" and not (tmp_path / "c.ply").exists()


def test_info_tells_counts_bounds_duration_degree_and_size(tmp_path, moment):
    ply.write(moment, tmp_path / "a.ply")
    facts = describe(tmp_path / "a.ply")
    assert facts["gaussians"] == 400 and facts["sh_degree"] == 0 and facts["seconds"] == 0
    assert facts["bytes"] == (tmp_path / "a.ply").stat().st_size
    np.testing.assert_allclose(facts["low"], moment.means.amin(0), atol=1e-5)
    Gaussians4D.still(moment).save(tmp_path / "gaussians.safetensors", {"fps": "10", "frames": "5"})
    assert describe(tmp_path)["seconds"] == 0.5
    with pytest.raises(InputError, match="expected a run"):
        describe(tmp_path / "a.txt")


def test_commands_print_a_line_or_json(tmp_path, moment):
    ply.write(moment, tmp_path / "a.ply")
    for command, words, expected in (
        (convert_command, ["a.ply", "b.spz"], "bytes"),
        (info_command, ["b.spz"], "gaussians: 400"),
    ):
        app = typer.Typer()
        app.command()(command)
        done = CliRunner().invoke(app, [str(tmp_path / word) for word in words])
        assert done.exit_code == 0 and expected in done.output
    app = typer.Typer()
    app.command()(info_command)
    assert json.loads(CliRunner().invoke(app, [str(tmp_path / "b.spz"), "--json"]).output)["gaussians"] == 400
