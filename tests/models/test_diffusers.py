"""SVD's weights as diffusers keeps them: its names and shapes, and where it is installed the same numbers come out."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2.errors import SetupError
from d2.fileio import write_json, write_tensors
from d2.models.conditioner import svd_vector
from d2.models.diffusers import STEMS, origins
from d2.models.unet import UNetConfig
from d2.models.vae import VAEConfig
from d2.models.weights import SV3D, SVD, check, digest, find, layout, load, read_header

# Number of tensors and sha256 of the lines "name [shape]\n", sorted, of UNetSpatioTemporalConditionModel and
# AutoencoderKLTemporalDecoder (diffusers 0.42.1) and CLIPVisionModelWithProjection (transformers 5.24.0), built with
# the hyper-parameters of stable-video-diffusion-img2vid-xt.
RECORDED = {
    "unet": (1428, "a7bf79bfa71766823073549f4c7fec5c2dd2903cf88a7d2269808add27392b4e"),
    "vae": (374, "2d64aece6e0446f17f2c05326949f6c930fef970bc651f62fa76a21a7b8f88a9"),
    "image_encoder": (520, "2373151d3ea4fd677b5485f33f55a6331c0b2c798ab2951c9a6db8dcf3109763"),
}
WIDTHS = (32, 64)  # of the tiny networks


@pytest.fixture
def spec(spec):
    """The tiny pair's, with attention where diffusers can have it and SVD's three numbers."""
    unet = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=16,
        context_dim=24, adm_in_channels=24,
    )  # fmt: skip
    return replace(spec, unet=unet, slots=SVD.slots, vae=VAEConfig(ch=32, ch_mult=(1, 2)))


def pieces(spec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of diffusers' folders."""
    found = {}
    for origin in origins(layout(spec), spec.unet.num_res_blocks, len(spec.vae.ch_mult)).values():
        for name, shape in zip(origin.names, origin.shapes, strict=True):
            assert found.setdefault(name, shape) == shape  # the encoder is there once and is used twice
    return found


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], variant: str = "") -> Path:
    for part, stem in STEMS.items():
        own = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
        write_tensors(folder / part / f"{stem}{variant}.safetensors", own)
    return folder


def random(spec) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) * 0.2 for name, shape in pieces(spec).items()}


def listing(shapes: dict[str, tuple[int, ...]]) -> tuple[int, str]:
    text = "".join(f"{name} {list(shape)}\n" for name, shape in sorted(shapes.items()))
    return len(shapes), hashlib.sha256(text.encode()).hexdigest()


def test_the_names_and_shapes_are_those_of_diffusers_at_full_size():
    found = pieces(SVD)
    for part, recorded in RECORDED.items():
        own = {name.removeprefix(f"{part}/"): s for name, s in found.items() if name.startswith(f"{part}/")}
        assert listing(own) == recorded


def test_every_official_tensor_is_made_and_but_for_the_encoder_each_tensor_is_used_once():
    made = origins(layout(SVD), 2, 4)
    assert made.keys() == layout(SVD).keys()
    for name, origin in made.items():
        if origin.shapes != (layout(SVD)[name],):
            made_of = [torch.empty(shape, device="meta") for shape in origin.shapes]
            assert origin.make(*made_of).shape == layout(SVD)[name], name
    used = [name for origin in made.values() for name in origin.names]
    twice = {name for name, count in Counter(used).items() if count > 1}
    assert twice == {name for name in used if name.startswith(("vae/encoder.", "vae/quant_conv."))}


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_folder_loads_and_what_differs_in_more_than_its_name_is_converted(tmp_path, spec, variant):
    tensors = random(spec)
    stored = {name: t.half() if variant else t for name, t in tensors.items()}
    folder = write_folder(tmp_path / "svd", stored, variant)
    unet, look, first = (load(folder, spec, part) for part in ("unet", "conditioner", "first_stage"))
    same = lambda a, b: torch.equal(a, stored[b].float().reshape(a.shape))  # noqa: E731
    assert same(unet.input_blocks[0][0].weight, "unet/conv_in.weight")
    assert same(unet.output_blocks[-1][0].time_mixer.mix_factor, "unet/up_blocks.1.resnets.1.time_mixer.mix_factor")
    assert same(first.decoder.up[1].upsample.conv.bias, "vae/decoder.up_blocks.0.upsamplers.0.conv.bias")
    assert same(first.decoder.mid.attn_1.k.weight, "vae/decoder.mid_block.attentions.0.to_k.weight")
    visual = "image_encoder/vision_model.encoder.layers.1.self_attn"
    q, k, v = look.clip.visual.transformer.resblocks[1].attn.in_proj_weight.chunk(3)
    assert (
        same(q, f"{visual}.q_proj.weight") and same(k, f"{visual}.k_proj.weight") and same(v, f"{visual}.v_proj.weight")
    )
    assert torch.equal(look.clip.visual.proj.T, stored["image_encoder/visual_projection.weight"].float())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(look.vae.quant_conv(look.vae.encoder(x)), first.encoder(x), atol=1e-3, rtol=1e-3)


def test_shards_are_read_by_their_index(tmp_path, spec):
    tensors = random(spec)
    whole, folder = (write_folder(tmp_path / name, tensors) for name in ("whole", "shards"))
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    names = sorted(read_header(file))
    shards = {f"diffusion_pytorch_model-0000{k}-of-00002.safetensors": names[k - 1 :: 2] for k in (1, 2)}
    for name, own in shards.items():
        write_tensors(file.with_name(name), {key: tensors[f"unet/{key}"] for key in own})
    file.unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, own in shards.items() for key in own}}
    write_json(file.with_name(f"{file.name}.index.json"), index)
    sharded = load(folder, spec, "unet").state_dict()
    for name, tensor in load(whole, spec, "unet").state_dict().items():
        assert torch.equal(sharded[name], tensor), name
    assert digest(folder) != digest(whole)
    (file.with_name(min(shards))).unlink()
    with pytest.raises(SetupError, match="00001-of-00002"):
        check(folder, spec)
    write_json(file.with_name(f"{file.name}.index.json"), {"weight_map": {"a": "../../secret.safetensors"}})
    with pytest.raises(SetupError, match="not an index"):
        check(folder, spec)


def test_a_folder_that_is_not_the_model_gets_one_line(tmp_path, spec):
    tensors = random(spec)
    name = "vae/decoder.mid_block.attentions.0.to_k.weight"
    faults = {
        "1 tensor missing: vae/decoder.mid_block.attentions.0.to_k.weight": {
            k: v for k, v in tensors.items() if k != name
        },
        "1 tensor not part of it: unet/extra": tensors | {"unet/extra": torch.zeros(1)},
        r"to_k.weight (expected [64, 64], got [64, 64, 1, 1])": tensors | {name: tensors[name][..., None, None]},
    }
    for number, (words, changed) in enumerate(faults.items()):
        folder = write_folder(tmp_path / str(number), changed)
        with pytest.raises(SetupError) as caught:
            load(folder, spec, "first_stage")
        assert words in str(caught.value) and "\n" not in str(caught.value)
    tensors[name][0, 0] = float("nan")
    with pytest.raises(SetupError, match=r"attn_1\.k\.weight holds NaN"):
        load(write_folder(tmp_path / "nan", tensors), spec, "first_stage")
    (tmp_path / "nan/vae/diffusion_pytorch_model.safetensors").rename(tmp_path / "nan/vae/model.bin")
    with pytest.raises(SetupError, match=r"vae holds no diffusion_pytorch_model\.safetensors"):
        check(tmp_path / "nan", spec)


def test_a_folder_is_found_by_the_model_by_the_repository_and_as_it_is_after_the_file(tmp_path):
    places = [tmp_path / "svd_xt", tmp_path / "stable-video-diffusion-img2vid-xt", tmp_path]
    for place in reversed(places):
        for part in STEMS:
            (place / part).mkdir(parents=True)
        assert find(SVD, tmp_path) == place
    with pytest.raises(SetupError, match=r"sv3d_p\.safetensors"):
        find(SV3D, tmp_path)
    (tmp_path / SVD.filename).touch()
    assert find(SVD, tmp_path) == tmp_path / SVD.filename


# -- beside diffusers itself, where it is installed (make test-nerfstudio) -------------------------------------------


def settle(network: torch.nn.Module) -> torch.nn.Module:
    """Weights at which signals keep their size, and mixes that are not halves."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = values / fan_in**0.5 if fan_in > 1 else 1 + 0.1 * values if is_scale else 0.3 * values
    return network.eval().requires_grad_(False)


@pytest.fixture
def theirs():
    """Tiny networks of diffusers and transformers, as SVD's are."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=WIDTHS, num_attention_heads=(2, 4), addition_time_embed_dim=8, layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=24, cross_attention_dim=24, num_frames=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=WIDTHS, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 2
    )
    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=24,
            hidden_act="gelu",
        )
    )
    return {"unet": settle(unet), "vae": settle(vae), "image_encoder": settle(clip)}


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    """Their networks as they save themselves, the UNet in shards."""
    for part, network in theirs.items():
        network.save_pretrained(tmp_path / part, max_shard_size="1MB" if part == "unet" else "5GB")
    assert json.loads((tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    return tmp_path


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, float(b.abs().max())), rtol=0)


def test_the_unet_computes_what_diffusers_computes(theirs, folder, spec):
    ours = load(folder, spec, "unet")
    B, T = 2, 4
    x, numbers = torch.randn(B, T, 8, 8, 8), torch.tensor([[6.0, 127.0, 0.02], [24.0, 30.0, 0.5]])
    level, token = torch.tensor([0.3, -1.2]), torch.randn(B, 1, 24)
    expected = theirs["unet"](x, level, token, numbers, return_dict=False)[0]
    vector = torch.cat([svd_vector(*row.tolist(), T, 8) for row in numbers])
    context = ours.project_context(token.expand(B, T, -1).flatten(0, 1), T)
    near(ours(x.flatten(0, 1), level.repeat_interleave(T), context, vector, T), expected.flatten(0, 1))


def test_the_autoencoder_encodes_and_decodes_as_diffusers_does(theirs, folder, spec):
    first, look = load(folder, spec, "first_stage"), load(folder, spec, "conditioner")
    picture, z = torch.randn(2, 3, 32, 32), torch.randn(4, 4, 16, 16)
    mean, log_variance = first.encoder(picture).chunk(2, dim=1)
    expected = theirs["vae"].encode(picture).latent_dist
    near(mean, expected.mean)
    near(log_variance, expected.parameters.chunk(2, dim=1)[1])
    near(look.vae.mode(picture), expected.mode())
    near(first.decoder(z, 4), theirs["vae"].decode(z, num_frames=4).sample)


def test_clip_sees_what_it_sees_in_transformers(theirs, folder, spec):
    prepared = torch.randn(2, 3, 32, 32)
    ours = load(folder, spec, "conditioner").clip.visual
    near(ours(prepared), theirs["image_encoder"](prepared).image_embeds)


def test_the_recorded_names_are_those_of_the_installed_version():
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    with torch.device("meta"):
        networks = {
            "unet": diffusers.UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20)),
            "vae": diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
            ),
            "image_encoder": transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=16,
                    patch_size=14,
                    projection_dim=1024,
                    hidden_act="gelu",
                )
            ),
        }
    for part, network in networks.items():
        assert listing({name: tuple(t.shape) for name, t in network.state_dict().items()}) == RECORDED[part]
