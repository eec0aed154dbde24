"""The pair that comes with d2: a picture of a toy it never saw becomes that toy from all sides, moving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from surroundings import ROOT

from d2 import config, images, phases
from d2.generation import generate
from d2.models import weights
from d2.models.unet import VideoUNet
from d2.pair import load_models
from d2.recon.composition import scores_of, toy_matrix
from d2.run import Run
from d2.settings import GenerateConfig

TOY = 29  # of the test split
TOY_PICTURE = ROOT / "tests" / "data" / "toy.png"  # the same, larger


@pytest.fixture(scope="module")
def settings() -> GenerateConfig:
    return config.load(GenerateConfig, config.preset_path("tiny", "generate"))


@pytest.fixture(scope="module")
def truth(settings) -> np.ndarray:  # [V, F, 4, H, W]
    return toy_matrix(TOY, settings)


@pytest.fixture(scope="module")
def cells(settings, truth, tmp_path_factory) -> torch.Tensor:  # [V, F, 3, H, W]
    folder = tmp_path_factory.mktemp("embedded")
    images.write_png(folder / "front.png", images.to_uint8(np.moveaxis(truth[-1, 0, :3], 0, -1)))
    sets = ("steps=6", "image_frame_ratio=null")
    made = generate(folder / "front.png", folder / "run", preset="tiny", sets=sets, remove_background=False)
    return Run.open(made.folder).matrix().tensor(list(range(settings.views)), list(range(settings.frames)))


def test_a_toy_it_never_saw_is_near_the_truth_from_every_side(cells, truth):
    found = scores_of(cells, torch.from_numpy(truth))
    still = scores_of(cells[:, :1].expand_as(cells), torch.from_numpy(truth))
    assert found["psnr"] > 17.5  # random weights: below 8
    assert found["psnr"] > still["psnr"] - 1  # its motion is not worse than none


def test_it_moves_as_the_toy_does(cells, truth):
    assert scores_of(cells, torch.from_numpy(truth))["motion"] > 0.2  # no motion: 0; the true one: 1


def test_it_goes_through_the_official_pairs_loader_networks_and_sampler(settings, tmp_path, monkeypatch):
    """No second code path: same classes, small hyper-parameters."""
    called = []
    for module, name in ((weights, "check"), (weights, "load"), (phases, "sample_matrix")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, watched(called, name, whole))
    generate(TOY_PICTURE, tmp_path / "run", preset="tiny", sets=("steps=1",))
    assert set(called) == {"check", "load", "sample_matrix"}
    pair, official = load_models(settings), GenerateConfig()
    for model in ("view", "frame"):
        pair.lines(model, [])
        assert type(pair.unets[model]) is VideoUNet
        assert type(settings.spec(model).unet) is type(official.spec(model).unet)


def test_no_module_knows_the_pair_by_name():
    named = [path for path in (ROOT / "d2").rglob("*.py") if "tiny_view" in path.read_text(encoding="utf-8")]
    assert named == []


def watched(called: list[str], name: str, whole):
    def call(*words, **options):
        called.append(name)
        return whole(*words, **options)

    return call
