"""Where the tensors of SVD's official checkpoint come from in the folders of diffusers: unet/, vae/, image_encoder/.

The networks are the same, their layers are called otherwise.  Four things differ in more than the name: q, k and v of
CLIP are three matrices instead of one, its projection is transposed, attention in the autoencoder is made of linear
layers instead of 1×1 convolutions, and there is one autoencoder: the 1×1 convolution behind its encoder, which the
official first stage has no place for, is merged into the encoder's last layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "image_encoder": "model"}  # of files

RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "nin_shortcut": "conv_shortcut",
}  # fmt: skip
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
TRANSFORMER = {
    "time_stack": "temporal_transformer_blocks", "time_pos_embed.0": "time_pos_embed.linear_1",
    "time_pos_embed.2": "time_pos_embed.linear_2",
}  # fmt: skip
AUTOENCODER = {
    "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "mid.attn_1": "mid_block.attentions.0",
    "norm_out": "conv_norm_out", "conv_out.time_mix_conv": "time_conv_out",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
CLIP = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1": "vision_model.embeddings.patch_embedding", "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm", "proj": "visual_projection.weight",
}  # fmt: skip
CLIP_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


class Origin(NamedTuple):
    """The tensors of diffusers that one official tensor is made of."""

    names: tuple[str, ...]  # folder/name
    shapes: tuple[Shape, ...]
    make: Callable[..., Tensor]  # of these tensors


def origins(
    layout: Mapping[str, Shape],  # official name -> shape
    blocks: int,  # residual blocks a level of the UNet
    levels: int,  # of the autoencoder
) -> dict[str, Origin]:
    """Official name -> what it is made of."""
    return {name: _origin(name, shape, blocks, levels) for name, shape in layout.items()}


def _origin(name: str, shape: Shape, blocks: int, levels: int) -> Origin:
    if name.startswith("model.diffusion_model."):
        return _same(f"unet/{_unet(name.removeprefix('model.diffusion_model.'), blocks)}", shape)
    if ".open_clip." in name:
        return _clip(name.partition(".visual.")[2], shape)
    inner = re.sub(r"first_stage_model\.|conditioner\.embedders\.\d+\.encoder\.", "", name)
    if name.startswith("first_stage_model.encoder.conv_out."):
        return _merged(shape)
    theirs = f"vae/{_autoencoder(inner, levels)}"
    if re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", theirs):
        return Origin((theirs,), (shape[:2],), lambda linear: linear[:, :, None, None])
    return _same(theirs, shape)


def _same(name: str, shape: Shape) -> Origin:
    return Origin((name,), (shape,), lambda tensor: tensor)


def _unet(name: str, blocks: int) -> str:
    """The name of a layer; levels and layers are counted together in the official UNet, apart in diffusers'."""
    if found := _starting_with(ENDS, name):
        return found
    place, number, *rest = name.split(".")
    if place == "middle_block":
        home, kind = "mid_block", MIDDLE[number]
    else:
        layer, *rest = rest
        side = "down" if place == "input_blocks" else "up"
        level, k = divmod(int(number) - (side == "down"), blocks + 1)
        home = f"{side}_blocks.{level}"
        if rest[0] in ("op", "conv"):
            return f"{home}.{side}samplers.0.conv.{rest[1]}"
        kind = f"resnets.{k}" if layer == "0" else f"attentions.{k}"
    inner = ".".join(rest)
    renamed = _residual(inner) if kind.startswith("resnets") else _starting_with(TRANSFORMER, inner) or inner
    return f"{home}.{kind}.{renamed}"


def _residual(name: str) -> str:
    """Within a block that looks at each picture and then along the clip."""
    if name.endswith("mix_factor"):
        return "time_mixer.mix_factor"
    which = "temporal" if name.startswith("time_stack.") else "spatial"
    name = name.removeprefix("time_stack.")
    return f"{which}_res_block.{_starting_with(RESIDUAL, name) or name}"


def _autoencoder(name: str, levels: int) -> str:
    """encoder.…, decoder.… or quant_conv.…; the official decoder counts its levels from the finest, diffusers' not."""
    side, _, inner = name.partition(".")
    if side == "quant_conv":
        return name
    if level := re.fullmatch(r"(down|up)\.(\d+)\.(block|downsample|upsample)\.(\w+)\.(.+)", inner):
        way, number, kind, part, rest = level.groups()
        home = f"{side}.{way}_blocks.{number if way == 'down' else levels - 1 - int(number)}"
        if kind != "block":
            return f"{home}.{kind}rs.0.{part}.{rest}"
        home, inner = f"{home}.resnets.{part}", rest
    else:
        renamed = _starting_with(AUTOENCODER, inner) or inner
        found = re.fullmatch(r"(mid_block\.(?:resnets|attentions)\.\d)\.(.+)", renamed)
        if not found:
            return f"{side}.{renamed}"
        home, inner = f"{side}.{found[1]}", found[2]
        if "attentions" in home:
            return f"{home}.{_starting_with(ATTENTION, inner)}"
    return f"{home}.{_residual(inner) if side == 'decoder' else _starting_with(RESIDUAL, inner) or inner}"


def _clip(name: str, shape: Shape) -> Origin:
    if name == "proj":
        return Origin((f"image_encoder/{CLIP[name]}",), (shape[::-1],), lambda projection: projection.T)
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if not block:
        return _same(f"image_encoder/{_starting_with(CLIP, name)}", shape)
    home, inner = f"image_encoder/vision_model.encoder.layers.{block[1]}", block[2]
    if inner.startswith("attn.in_proj_"):
        names = tuple(f"{home}.self_attn.{part}_proj.{inner.removeprefix('attn.in_proj_')}" for part in "qkv")
        return Origin(names, ((shape[0] // 3, *shape[1:]),) * 3, lambda *parts: torch.cat(parts))
    return _same(f"{home}.{_starting_with(CLIP_BLOCK, inner)}", shape)


def _merged(shape: Shape) -> Origin:
    """The encoder's last layer with the 1×1 convolution behind it: Q(Wx + b) + q = QW x + (Qb + q)."""
    channels = shape[0]
    quant = (channels, channels, 1, 1)
    if len(shape) > 1:
        names = "vae/quant_conv.weight", "vae/encoder.conv_out.weight"
        return Origin(names, (quant, shape), lambda Q, W: torch.einsum("abij, bchw -> achw", Q.float(), W.float()))
    names = "vae/quant_conv.weight", "vae/encoder.conv_out.bias", "vae/quant_conv.bias"
    return Origin(names, (quant, shape, shape), lambda Q, b, q: Q[..., 0, 0].float() @ b.float() + q.float())


def _starting_with(table: Mapping[str, str], name: str) -> str | None:
    """The name with its beginning replaced as the table says, whole parts only; None where it says nothing."""
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return None
