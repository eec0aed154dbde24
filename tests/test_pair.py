"""The pair of models: what its configuration describes, and what is said where a file is missing."""

import shutil

import pytest
import torch

from d2 import pair
from d2.config import load
from d2.errors import InputError, SetupError
from d2.models.weights import SV3D, SVD, layout
from d2.pair import PairConfig, check_size, load_models, model_angles


def test_the_defaults_are_the_official_checkpoints():
    for model, official in (("view", SV3D), ("frame", SVD)):
        spec = PairConfig().spec(model)
        assert layout(spec) == layout(official)
        assert (spec.filename, spec.slots, spec.repository) == (official.filename, official.slots, official.repository)
    assert PairConfig().multiple == 64


def test_a_size_the_networks_cannot_halve_is_refused():
    check_size(576, PairConfig())
    with pytest.raises(InputError, match="multiple of 64"):
        check_size(600, PairConfig())


def test_lists_of_a_preset_become_tuples_and_other_types_are_refused():
    assert load(PairConfig, {"unet_mult": [1, 2]}).unet_mult == (1, 2)
    with pytest.raises(InputError, match="unet_mult"):
        load(PairConfig, {"unet_mult": [1, "2"]})


def test_both_missing_files_are_named_in_one_line(tmp_path):
    with pytest.raises(SetupError) as caught:
        load_models(PairConfig(), tmp_path)
    assert "svd_xt.safetensors" in str(caught.value)
    assert "sv3d_p.safetensors" in str(caught.value)


def test_a_pair_nobody_publishes_asks_for_the_folder_only(tiny, tmp_path):
    settings = load(PairConfig, {"view_model": "mine", "view_source": "", "frame_model": "ours", "frame_source": ""})
    with pytest.raises(SetupError, match=r"mine\.safetensors.*--weights DIR.*ours\.safetensors") as caught:
        load_models(settings, tmp_path)
    assert "Hugging Face" not in str(caught.value)


def test_doctor_says_how_to_get_the_weights_and_refuses_wrong_ones(tiny, tmp_path):
    shutil.copy(tiny / "tiny_frame.safetensors", tmp_path / "svd_xt.safetensors")
    view, frame = pair.checks(tmp_path)
    assert not view.ok
    assert "hf download stabilityai/sv3d" in view.detail
    assert not frame.ok
    assert "is not svd_xt" in frame.detail


def test_the_views_go_once_round_and_the_last_is_the_input():
    assert torch.allclose(model_angles(4), torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64) * torch.pi)
