"""LPIPS, CLIP-I and FVD on random weights: their formulas, the layouts they load, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from d2 import fileio
from d2.errors import SetupError
from d2.models.clip import OpenCLIP, ViTConfig
from d2.recon import fvd, perceptual

TINY_CLIP = ViTConfig(image_size=28, patch_size=14, width=16, layers=1, heads=2, output_dim=8)


def lpips_state(slices=perceptual.ALEXNET) -> dict[str, torch.Tensor]:
    """All of an LPIPS model's state as its authors' code saves it."""
    torch.manual_seed(0)
    state = perceptual.LPIPS(slices).state_dict()
    state = {k: v.abs() if k.startswith("lin") else v for k, v in state.items()}
    twice = {f"lins.{k[3]}{k[4:]}": v.clone() for k, v in state.items() if k.startswith("lin")}
    return (
        state | twice | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    )


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alex.safetensors"
    fileio.write_tensors(path, lpips_state())
    return path


def test_lpips_is_the_formula_of_the_paper_on_alexnet(alexnet):
    model, w = perceptual.load_lpips(alexnet), lpips_state()
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 48, 40, generator=g) for _ in range(2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    layers = [("slice1.0", 4, 2), ("slice2.3", 1, 2), ("slice3.6", 1, 1), ("slice4.8", 1, 1), ("slice5.10", 1, 1)]

    def features(p):
        p = (2 * p - 1 - shift[:, None, None]) / scale[:, None, None]
        for k, (name, stride, pad) in enumerate(layers):
            p = F.max_pool2d(p, 3, 2) if k in (1, 2) else p
            p = F.relu(F.conv2d(p, w[f"net.{name}.weight"], w[f"net.{name}.bias"], stride, pad))
            yield p / (p.square().sum(1, keepdim=True).sqrt() + 1e-10)

    expected = sum(
        ((a - b).square() * w[f"lin{k}.model.1.weight"].view(1, -1, 1, 1)).sum(1).mean((1, 2))
        for k, (a, b) in enumerate(zip(features(x), features(y), strict=True))
    )
    torch.testing.assert_close(model(x, y), expected)
    assert (model(x, y) > 0).all() and model(x, x).abs().max() == 0


def test_lpips_with_vgg_has_the_names_and_numbers_of_the_original():
    with torch.device("meta"):
        names = perceptual.LPIPS(perceptual.VGG16).state_dict()
    assert {n.split(".")[2] for n in names if n.startswith("net.slice5")} == {"24", "26", "28"}
    assert tuple(names["net.slice4.17.weight"].shape) == (512, 256, 3, 3)
    assert tuple(names["lin4.model.1.weight"].shape) == (1, 512, 1, 1)
    assert len(names) == 2 * 13 + 5


@pytest.mark.parametrize("fault", ["net.slice3.6.bias", "lin2.model.1.weight"])
def test_an_lpips_file_that_lacks_a_tensor_is_refused_by_its_name(tmp_path, fault):
    state = lpips_state()
    del state[fault]
    fileio.write_tensors(tmp_path / "w.safetensors", state)
    with pytest.raises(SetupError, match=f"1 tensors differ: {fault}"):
        perceptual.load_lpips(tmp_path / "w.safetensors")


def test_pickled_weights_are_never_opened(tmp_path):
    with pytest.raises(SetupError, match=r"weights\.pth.*safetensors only"):
        perceptual.load_lpips(tmp_path / "weights.pth")


def test_clip_takes_the_image_half_of_a_file_and_finds_a_picture_most_like_itself(tmp_path):
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in OpenCLIP(TINY_CLIP).state_dict().items()}
    fileio.write_tensors(tmp_path / "clip.safetensors", state | {"text_projection": torch.zeros(8, 8)})
    model = perceptual.load_clip(tmp_path / "clip.safetensors", TINY_CLIP)
    x, y = torch.rand(1, 3, 50, 40), torch.rand(1, 3, 50, 40)
    assert perceptual.likeness(model, x, x).item() == pytest.approx(1, abs=1e-5)
    assert perceptual.likeness(model, x, y).item() < 1


def test_frechet_distance_is_that_of_the_gaussians_with_the_samples_moments():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + 1
    A, B = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(A @ B).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * root)
    assert fvd.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    line = np.array([[0.0], [2.0]]), np.array([[5.0], [11.0]])  # means 1 and 8, deviations √2 and 3√2
    assert fvd.frechet(*line) == pytest.approx(49 + 8)
    assert fvd.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert fvd.frechet(a[:1], b[:1]) == pytest.approx(((a[0] - b[0]) ** 2).sum())  # one video has no spread


def test_videos_run_over_frames_views_the_diagonal_and_the_whole_matrix():
    matrix = torch.tensor([[0, 1], [10, 11], [20, 21]])  # view, frame
    rows = {order: [video.tolist() for video in fvd.videos(matrix, order)] for order in fvd.ORDERS}
    assert rows["frames"] == [[0, 1], [10, 11], [20, 21]]
    assert rows["views"] == [[0, 10, 20], [1, 11, 21]]
    assert rows["diagonal"] == [[0, 11, 20], [10, 21, 0], [20, 1, 10]]
    assert rows["4d"][:2] == [[0, 1, 11, 10, 20, 21], [10, 11, 21, 20, 0, 1]]


def test_fvd_leaves_out_orders_whose_videos_are_too_short(monkeypatch):
    monkeypatch.setattr(fvd, "features", lambda model, video: video.mean((1, 2, 3))[:9])
    sample, truth = torch.rand(3, 4, 3, 2, 2), torch.rand(3, 4, 3, 2, 2)
    assert fvd.fvd(None, sample, truth).keys() == {"fvd_4d"}
    sample, truth = torch.rand(3, 10, 3, 2, 2), torch.rand(3, 10, 3, 2, 2)
    found = fvd.fvd(None, sample, truth)
    assert found.keys() == {"fvd_frames", "fvd_diagonal", "fvd_4d"} and min(found.values()) > 0


def test_i3d_has_the_layout_of_its_authors_and_halves_lengths_upwards():
    with torch.device("meta"):
        model = fvd.I3D()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Mixed_4f.b1b.conv3d.weight"] == (320, 160, 3, 3, 3)
    assert shapes["Mixed_5c.b3b.bn.running_var"] == (128,)
    assert shapes["logits.conv3d.bias"] == (400,)
    assert len([name for name in shapes if name.endswith("conv3d.weight")]) == 3 + 9 * 6 + 1
    assert tuple(model(torch.zeros(2, 3, fvd.LEAST, 224, 224, device="meta")).shape) == (2, 400)


def test_a_unit_of_i3d_pads_as_tensorflow_does():
    unit = fvd.Unit(1, 1, 3, 2).eval()
    with torch.no_grad():
        unit.conv3d.weight.fill_(1)
    video = torch.ones(1, 1, 4, 5, 4)  # even lengths: one zero, behind; odd lengths: one on each side
    found = unit(video)[0, 0] * (1 + 1e-3) ** 0.5
    assert tuple(found.shape) == (2, 3, 2)
    assert found[0, 0, 0].item() == pytest.approx(3 * 2 * 3) and found[1, 2, 1].item() == pytest.approx(2 * 2 * 2)
