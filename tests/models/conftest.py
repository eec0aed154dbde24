import importlib.util
import os
from pathlib import Path

import pytest
import torch

from d2.models.clip import ViTConfig
from d2.models.unet import UNetConfig
from d2.models.vae import VAEConfig
from d2.models.weights import ModelSpec, layout, leftovers

TINY_UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_head_channels=16,
    context_dim=24,
    adm_in_channels=40,
)
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
TINY_CLIP = ViTConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, output_dim=24)


@pytest.fixture
def unet_config() -> UNetConfig:
    return TINY_UNET


@pytest.fixture
def vae_config() -> VAEConfig:
    return TINY_VAE


@pytest.fixture
def clip_config() -> ViTConfig:
    return TINY_CLIP


@pytest.fixture
def spec() -> ModelSpec:
    slots = ("image", "latent", "augmentation")
    return ModelSpec("tiny", TINY_UNET, slots, True, "nobody/tiny", TINY_CLIP, (24, 7, 50), TINY_VAE)


@pytest.fixture
def shared() -> Path:
    folder = Path(os.environ.get("D2_SHARED", Path(__file__).parents[2].parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no recorded data in {folder} (set D2_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def sparse():
    """Writes a full-size file of zeros that takes no room: (path, spec, dtype) -> path."""
    source = Path(__file__).parents[2] / "benchmarks" / "synthetic_weights.py"
    module_spec = importlib.util.spec_from_file_location("synthetic_weights", source)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)

    def write(path: Path, spec: ModelSpec, dtype: str) -> Path:
        module.write_sparse(path, layout(spec) | leftovers(spec), dtype)
        return path

    return write
