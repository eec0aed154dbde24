"""Nothing at all, and a single Gaussian, on their way to pictures and files."""

from __future__ import annotations

import pytest
import torch
from faults.assertions import expect_fault

from d2.recon import drawing
from d2.recon.exports import export
from d2.recon.formats import ply, splat, spz
from d2.recon.gaussians import Gaussians3D, Gaussians4D

SPLATS = {"ply": ply.read, "spz": spz.read, "splat": splat.read}


def some(count: int) -> Gaussians4D:
    quats = torch.tensor([[1.0, 0, 0, 0]]).expand(count, 4)
    means, scales, sh = torch.zeros(count, 3), torch.full((count, 3), 0.2), torch.full((count, 1, 3), 0.5)
    return Gaussians4D.still(Gaussians3D(means, quats, scales, torch.full((count,), 0.9), sh))


@pytest.mark.row(53)
def test_one_gaussian_is_drawn_written_and_read(tmp_path):
    files = export(some(1), [*SPLATS, "glb", "usd", "html", "contact"], tmp_path, time=0.5, name="one")
    assert all(path.stat().st_size > 0 for path in files.values())
    for what, read in SPLATS.items():
        found = read(files[what])
        assert len(found) == 1 and found.opacities.item() == pytest.approx(0.9, abs=0.005)
    sheet = drawing.contact_sheet(some(1), [0.5])
    assert sheet.min() < 250 and sheet.max() == 255


@pytest.mark.row(53)
def test_no_gaussian_is_one_line_and_writes_nothing(tmp_path):
    for formats in (list(SPLATS), ["html"], ["usd"], ["contact"]):
        expect_fault(lambda f=formats: export(some(0), f, tmp_path / "out"), 3, "no Gaussians", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
