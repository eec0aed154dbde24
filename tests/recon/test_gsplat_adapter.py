"""The adapter calls gsplat as gsplat is: its recorded signature, its shapes, and the twin's numbers behind it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from scenes import camera, gaussians, motion

from d2.errors import SetupError
from d2.recon.raster import gsplat as adapter
from d2.recon.raster import image_plane_gradient, rasterize

# Parameters of gsplat.rasterization in 1.5.3, in order; those without a default first.
REQUIRED = ["means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "width", "height"]
OPTIONAL = [
    "near_plane", "far_plane", "radius_clip", "eps2d", "sh_degree", "packed", "tile_size", "backgrounds",
    "render_mode", "sparse_grad", "absgrad", "rasterize_mode", "channel_chunk", "distributed", "camera_model",
    "segmented", "covars", "with_ut", "with_eval3d", "radial_coeffs", "tangential_coeffs", "thin_prism_coeffs",
    "ftheta_coeffs", "rolling_shutter", "viewmats_rs",
]  # fmt: skip


def installed_rendering() -> ast.FunctionDef:
    """gsplat's entry point as source: importing gsplat without CUDA would start a build."""
    spec = importlib.util.find_spec("gsplat")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "rendering.py").read_text())
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "rasterization")


def test_recorded_signature_is_that_of_the_installed_gsplat():
    arguments = installed_rendering().args
    assert [a.arg for a in arguments.args] == REQUIRED + OPTIONAL
    assert len(arguments.defaults) == len(OPTIONAL)


class FakeGsplat:
    """Refuses what gsplat would refuse, draws with the twin, returns what gsplat returns."""

    def __init__(self, has_batches: bool):
        self.has_batches, self.calls = has_batches, 0
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in REQUIRED]
        parameters += [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in OPTIONAL]
        self.signature = inspect.Signature(parameters)

    def rasterization(self, *args, **kwargs):
        self.calls += 1
        call = self.signature.bind(*args, **kwargs).arguments
        means, viewmats = call["means"], call["viewmats"]
        assert call["packed"] is False
        assert means.ndim == 2 or self.has_batches, "gsplat 1.4 has no batch dimension"
        batch, C = means.shape[:-2], viewmats.shape[-3]
        N = means.shape[-2]
        assert call["quats"].shape == (*batch, N, 4) and call["scales"].shape == (*batch, N, 3)
        assert call["opacities"].shape == (*batch, N) and call["Ks"].shape == (*batch, C, 3, 3)
        assert viewmats.shape == (*batch, C, 4, 4)
        if call.get("backgrounds") is not None:
            assert call["backgrounds"].shape == (*batch, C, 3)
        names = (
            *REQUIRED,
            "near_plane",
            "far_plane",
            "eps2d",
            "backgrounds",
            "render_mode",
            "rasterize_mode",
            "sh_degree",
        )
        chosen = {k: call[k] for k in names}
        if chosen["sh_degree"] is not None and batch:
            assert chosen["colors"].shape[:-2] == (*batch, N)
            chosen["colors"] = chosen["colors"][0]
        image, alpha, meta = rasterize(**chosen, backend="reference")
        return image, alpha, {"means2d": meta["means2d"]}


@pytest.fixture
def fake(monkeypatch, request):
    version = getattr(request, "param", "1.5.3")
    fake = FakeGsplat(has_batches=version != "1.4.0")
    module = types.ModuleType("gsplat.rendering")
    module.rasterization = fake.rasterization
    monkeypatch.setitem(sys.modules, "gsplat", types.ModuleType("gsplat"))
    monkeypatch.setitem(sys.modules, "gsplat.rendering", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(adapter, "version", lambda: version)
    return fake


@pytest.mark.parametrize("fake", ["1.4.0", "1.5.3"], indirect=True)
@pytest.mark.parametrize("sh_degree", [None, 1])
def test_moving_gaussians_reach_gsplat_sliced_and_give_the_twins_numbers(fake, sh_degree):
    results = []
    for backend in ("gsplat", "reference"):
        scene = {k: v.clone().requires_grad_() for k, v in gaussians(25).items()}
        if sh_degree is not None:
            colors = torch.randn(25, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            scene["colors"] = colors.requires_grad_()
        move = motion(25, [0.2, 0.9])
        viewmat, K = camera(18, 14)
        image, alpha, meta = rasterize(
            **scene, viewmats=torch.stack([viewmat, viewmat]), Ks=torch.stack([K, K]), width=18, height=14, motion=move,
            sh_degree=sh_degree, backgrounds=torch.ones(2, 3).double(), backend=backend,
        )  # fmt: skip
        (image.square().sum() + alpha.sum()).backward()
        results.append((image, alpha, image_plane_gradient(meta), scene["means"].grad))
    for ours, twin in zip(*results, strict=True):
        assert ours.shape == twin.shape
        torch.testing.assert_close(ours, twin, rtol=1e-9, atol=1e-9)
    assert fake.calls == (2 if adapter.version() == "1.4.0" else 1)


def test_without_cuda_gsplat_is_never_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)  # an import would raise ImportError
    with pytest.raises(SetupError, match="needs a CUDA GPU"):
        adapter.rasterization()


@pytest.mark.row(60)
def test_a_gsplat_that_does_not_build_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(SetupError, match="does not build here"):
        adapter.rasterization()
