import dataclasses
import math

import pytest
import torch

from d2.config import load
from d2.errors import InputError, Stopped
from d2.recon import dataset, pipeline, rig
from d2.recon.config import ReconstructConfig

ANCHOR = 20  # a cell of the last view


@pytest.fixture
def data(run_folder):
    return dataset.load(run_folder)


def test_mirroring_twice_is_nothing_and_keeps_the_anchor(data):
    once = rig.mirrored(data, ANCHOR)
    assert torch.allclose(rig.mirrored(once, ANCHOR).viewmats, data.viewmats, atol=1e-5)
    assert torch.allclose(once.viewmats[ANCHOR], data.viewmats[ANCHOR], atol=1e-5)
    assert not torch.allclose(once.viewmats, data.viewmats, atol=0.1)


def test_a_rig_that_learned_nothing_is_the_believed_one(data):
    learned = rig.Learned(data)
    cells = torch.arange(len(data))
    assert torch.allclose(learned.viewmats(data, cells), data.viewmats, atol=1e-5)
    assert torch.allclose(learned.applied(data).Ks, data.Ks) and float(learned.prior(torch.ones(())).detach()) == 0


def test_elevation_lifts_every_camera_about_the_centre(data):
    learned = rig.Learned(data)
    learned.shared.data[0] = 0.1 / rig.ELEVATION
    before, after = (d.camera_centres() - learned.centre for d in (data, learned.applied(data)))
    rise = torch.asin(after[:, 2] / after.norm(dim=1)) - torch.asin(before[:, 2] / before.norm(dim=1))
    assert torch.allclose(rise, torch.full_like(rise, 0.1), atol=1e-4)
    assert torch.allclose(after.norm(dim=1), before.norm(dim=1), atol=1e-4)


def test_a_wider_lens_comes_nearer_so_that_the_object_stays_as_large(data):
    learned = rig.Learned(data)
    learned.shared.data[1] = math.log(1.2) / rig.LOG_FOCAL
    seen = [
        (data.Ks[0] @ (w[:3, :3] @ learned.centre + w[:3, 3]))
        for w in (data.viewmats[0], learned.viewmats(data, torch.tensor([0])).detach()[0])
    ]
    assert torch.allclose(seen[0][:2] / seen[0][2], seen[1][:2] / seen[1][2], atol=1e-3)
    assert float(learned.applied(data).Ks.detach()[0, 0, 0] / data.Ks[0, 0, 0]) == pytest.approx(1.2)


def test_an_orbit_that_turns_the_other_way_is_found_and_comes_back_from_its_file(data, monkeypatch, tmp_path):
    for name, value in {
        "PROBE_STEPS": 150,
        "PROBE_GAUSSIANS": 300,
        "REFINE_STEPS": 40,
        "REFINE_GAUSSIANS": 300,
    }.items():
        monkeypatch.setattr(rig, name, value)
    told = []
    refined, found = rig.refine(rig.mirrored(data, ANCHOR), load(ReconstructConfig, {}), ANCHOR, message=told.append)
    assert found.mirrored and "the other way" in str(found) and len(told) == 2
    turns = refined.viewmats[:, :3, :3] @ data.viewmats[:, :3, :3].mT
    assert float(turns.diagonal(dim1=1, dim2=2).sum(1).min()) > 1 + 2 * math.cos(math.radians(5))
    rig.save(tmp_path / "rig.safetensors", refined, found)
    again, record = rig.load(tmp_path / "rig.safetensors", data)
    assert torch.equal(again.viewmats, refined.viewmats) and record["mirrored"]
    with pytest.raises(InputError, match="other pictures"):
        rig.load(tmp_path / "rig.safetensors", data.subset(torch.arange(3)))


def test_cameras_that_stand_lower_than_believed_are_found(data, monkeypatch):
    monkeypatch.setattr(rig, "REFINE_STEPS", 300)
    monkeypatch.setattr(rig, "REFINE_GAUSSIANS", 300)
    monkeypatch.setattr(rig, "PROBE_STEPS", 30)
    wrong = rig.Learned(data)
    wrong.shared.data[0] = math.radians(8) / rig.ELEVATION
    _, found = rig.refine(wrong.applied(data), load(ReconstructConfig, {}), ANCHOR)
    assert math.degrees(found.elevation) == pytest.approx(-8, abs=3)


def test_a_signal_ends_the_refining_with_the_command_that_begins_again(run_folder, tmp_path):
    with pytest.raises(Stopped, match="begin again with: d2 reconstruct") as stopped:
        pipeline.reconstruct(run_folder, tmp_path / "out", sets=("refine_rig=true",), should_stop=lambda: 15)
    assert stopped.value.exit_code == 143 and not (tmp_path / "out/recon/main/rig.safetensors").exists()


def test_a_lens_that_contradicting_pictures_leave_open_stays_as_believed(data, monkeypatch):
    for name, value in {"PROBE_STEPS": 20, "REFINE_STEPS": 250, "REFINE_GAUSSIANS": 300}.items():
        monkeypatch.setattr(rig, name, value)
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    data = dataclasses.replace(data, images=data.images[shuffled])
    _, found = rig.refine(data, load(ReconstructConfig, {}), ANCHOR)
    assert found.focal == 1
    monkeypatch.setattr(rig, "LENS_WEIGHT", 0.0)
    assert rig.refine(data, load(ReconstructConfig, {}), ANCHOR)[1].focal != 1
