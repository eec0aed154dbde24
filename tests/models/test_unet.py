from typing import cast

import pytest
import torch
from einops import EinopsError, rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2.models.blocks import (
    GEGLU,
    Attention,
    Blend,
    Mix,
    ResBlock,
    TemporalBlock,
    TransformerBlock,
    VideoResBlock,
)
from d2.models.unet import SVD_XT, VideoTransformer, VideoUNet


def inputs(config, B=1, T=3, size=4):
    x = torch.randn(B * T, config.in_channels, size, size)
    context = torch.randn(B * T, config.context_dim)
    return x, torch.full((B * T,), 0.3), context, torch.randn(B * T, config.adm_in_channels)


def randomised(module):
    """Norms and mixes away from their neutral values, so that a test sees them."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval().requires_grad_(False)


def test_attention_to_one_token_is_its_projected_value():
    attention = randomised(Attention(32, 24, 16))
    x, token = torch.randn(2, 5, 32), torch.randn(2, 1, 24)
    expected = attention(x, token)
    torch.testing.assert_close(attention.to_one_token(token).expand_as(expected), expected)


def test_a_block_equals_its_slow_twin_with_full_cross_attention():
    block = randomised(TransformerBlock(32, 24, 16))
    x, context = torch.randn(3, 5, 32), torch.randn(3, 1, 24)
    slow = x + block.attn1(block.norm1(x), block.norm1(x))
    slow = slow + block.attn2(block.norm2(slow), context)
    slow = slow + block.ff(block.norm3(slow))
    torch.testing.assert_close(block(x, block.attn2.to_one_token(context), T=3), slow)


def test_a_temporal_block_equals_its_slow_twin_with_full_cross_attention():
    block = randomised(TemporalBlock(32, 24, 16))
    T, pixels = 3, 5
    x, first = torch.randn(2 * T, pixels, 32), torch.randn(2, 1, 24)
    slow = rearrange(x, "(b t) s c -> (b s) t c", t=T)
    slow = slow + block.ff_in(block.norm_in(slow))
    slow = slow + block.attn1(block.norm1(slow), block.norm1(slow))
    slow = slow + block.attn2(block.norm2(slow), first.repeat_interleave(pixels, 0))
    slow = slow + block.ff(block.norm3(slow))
    slow = rearrange(slow, "(b s) t c -> (b t) s c", s=pixels)
    torch.testing.assert_close(block(x, block.attn2.to_one_token(first), T), slow)


def test_temporal_blocks_take_the_token_of_the_first_picture(unet_config):
    unet = randomised(VideoUNet(unet_config))
    context = torch.randn(6, unet_config.context_dim)  # two clips of three
    transformers = [m for m in unet.modules() if isinstance(m, VideoTransformer)]
    for transformer, ((spatial, temporal),) in zip(transformers, unet.project_context(context, 3), strict=True):
        here = cast(TransformerBlock, transformer.transformer_blocks[0]).attn2
        along = cast(TemporalBlock, transformer.time_stack[0]).attn2
        torch.testing.assert_close(spatial[:, 0], here.to_one_token(context))
        torch.testing.assert_close(temporal[:, 0], along.to_one_token(context[[0, 3]]))


def test_the_gate_of_the_feed_forward_is_the_exact_gelu():
    gate = GEGLU(4, 8)
    x = torch.randn(5, 4)
    value, g = gate.proj(x).chunk(2, -1)
    exact = value * g * 0.5 * (1 + torch.erf(g / 2**0.5))
    torch.testing.assert_close(gate(x), exact, rtol=0, atol=1e-6)


def test_the_unet_projects_context_in_the_order_it_uses_it(unet_config):
    unet = randomised(VideoUNet(unet_config))
    x, c_noise, context, vector = inputs(unet_config)
    used = []
    for module in unet.modules():
        if isinstance(module, VideoTransformer):
            module.register_forward_pre_hook(lambda module, args: used.append(module))
    tokens = unet.project_context(context, 3)
    unet(x, c_noise, tokens, vector, 3)
    assert used == [m for m in unet.modules() if isinstance(m, VideoTransformer)]
    assert len(used) == len(tokens)


def test_the_unet_mixes_a_parts_of_space_with_the_rest_of_time():
    mix = Mix()
    nn.init.constant_(mix.mix_factor, 2.0)
    a = torch.sigmoid(torch.tensor(2.0))
    spatial, temporal = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(mix(spatial, temporal), a * spatial + (1 - a) * temporal)


def test_the_position_in_the_clip_reaches_the_temporal_branch_only(unet_config):
    transformer = randomised(VideoTransformer(32, unet_config))
    x, context = torch.randn(3, 32, 2, 2), torch.randn(1, 1, unet_config.context_dim).expand(3, 1, -1)
    tokens = transformer.project_context(context, context[:1])
    order = [2, 0, 1]
    for factor, symmetric in ((50.0, True), (-50.0, False)):  # all space, all time
        nn.init.constant_(transformer.time_mixer.mix_factor, factor)
        straight, shuffled = transformer(x, tokens, 3)[order], transformer(x[order], tokens, 3)
        assert torch.allclose(straight, shuffled, atol=1e-5) is symmetric


def test_group_norms_of_the_unet_have_the_eps_of_the_reference(unet_config):
    for name, module in VideoUNet(unet_config).named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == (1e-6 if name.endswith(".norm") else 1e-5), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5, name


def test_temporal_residual_blocks_normalise_over_the_whole_clip():
    block = randomised(ResBlock(32, 32, None, (3, 1, 1)))
    x = torch.randn(1, 32, 7, 2, 2)
    louder = x.clone()
    louder[:, :, 0] *= 10
    # A kernel of 3 in two layers reaches two frames far; only the norm reaches the last.
    assert not torch.allclose(block(x)[:, :, 6], block(louder)[:, :, 6], atol=1e-3)


def test_a_residual_block_adds_the_embedding_of_each_frame_to_that_frame():
    block = randomised(VideoResBlock(32, 32, 16, (3, 1, 1)))
    x, emb = torch.randn(3, 32, 2, 2), torch.randn(3, 16)
    other = emb.clone()
    other[2] += 1
    nn.init.constant_(block.time_mixer.mix_factor, 50.0)
    changed = (block(x, emb, 3) != block(x, other, 3)).flatten(1).any(1)
    assert changed.tolist() == [False, False, True]


def test_clips_of_one_batch_do_not_see_each_other(unet_config):
    unet = randomised(VideoUNet(unet_config))
    x, c_noise, context, vector = inputs(unet_config, B=2)
    both = unet(x, c_noise, unet.project_context(context, 3), vector, 3)
    for clip in (slice(0, 3), slice(3, 6)):
        alone = unet(x[clip], c_noise[clip], unet.project_context(context[clip], 3), vector[clip], 3)
        torch.testing.assert_close(both[clip], alone, rtol=1e-4, atol=1e-4)


def test_blend_smooths_over_neighbouring_columns_of_the_same_view_and_set():
    x = torch.randn(2 * 4 * 3, 5)
    ours = rearrange(Blend(0.6)(x, T=3), "(u b v) s -> u b v s", u=2, b=4)
    columns = rearrange(x, "(u b v) s -> u b v s", u=2, b=4)
    torch.testing.assert_close(ours[:, 1], 0.6 * columns[:, 1] + 0.2 * (columns[:, 0] + columns[:, 2]))
    torch.testing.assert_close(ours[:, 0], 0.8 * columns[:, 0] + 0.2 * columns[:, 1])


def test_blending_some_of_the_columns_only_is_refused():
    blend = Blend(0.6, columns=4)
    blend(torch.randn(2 * 4 * 3, 5), T=3)
    with pytest.raises(EinopsError):
        blend(torch.randn(2 * 3 * 3, 5), T=3)


def test_reference_padding_of_blend_darkens_the_end_columns_by_a_fifth():
    ones = torch.ones(2 * 3 * 2, 4)
    assert torch.equal(Blend(0.6)(ones, T=2), ones)
    ours = rearrange(Blend(0.6, padding="reference")(ones, T=2), "(u b v) s -> u b v s", u=2, b=3)
    torch.testing.assert_close(ours[0, :, 0, 0], torch.tensor([0.8, 1.0, 0.8]))


def test_blend_leaves_queries_alone_and_acts_in_spatial_self_attention_only(unet_config):
    block = randomised(TransformerBlock(32, 24, 16))
    x, token = torch.randn(6, 5, 32), torch.randn(6, 1, 32)
    blend = Blend(0.6, sets=1)
    normed = block.norm1(x)
    slow = x + block.attn1(normed, blend(normed, 2)) + token
    torch.testing.assert_close(block(x, token, 2, blend), slow + block.ff(block.norm3(slow)))

    transformer = randomised(VideoTransformer(32, unet_config))
    nn.init.constant_(transformer.time_mixer.mix_factor, 50.0)
    called = []
    transformer.time_stack[0].register_forward_pre_hook(lambda module, args: called.append(len(args)))
    tokens = transformer.project_context(torch.randn(6, 1, 24), torch.randn(3, 1, 24))
    transformer(torch.randn(6, 32, 2, 2), tokens, 2, blend)
    assert called == [3]


@pytest.mark.parametrize("T", [1, 2, 5])
def test_the_unet_takes_any_number_of_pictures_and_any_even_size(unet_config, T):
    unet = randomised(VideoUNet(unet_config))
    x = torch.randn(T, 8, 6, 4)
    tokens = unet.project_context(torch.randn(T, unet_config.context_dim), T)
    out = unet(x, torch.zeros(T), tokens, torch.randn(T, unet_config.adm_in_channels), T)
    assert out.shape == (T, 4, 6, 4)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_single(unet_config, dtype):
    unet = VideoUNet(unet_config).eval().requires_grad_(False)
    x, c_noise, context, vector = inputs(unet_config)
    single = unet(x, c_noise, unet.project_context(context, 3), vector, 3)
    half = unet.to(dtype)
    x, context, vector = (t.to(dtype) for t in (x, context, vector))
    ours = half(x, c_noise, half.project_context(context, 3), vector, 3)
    assert ours.dtype == dtype
    assert (ours.float() - single).abs().max() < 0.05 * single.abs().max()


def test_the_full_size_unet_costs_1_58_tflop_a_frame_without_its_cross_attention():
    """1.646 with all of it: the one-token shortcut saves 4.1 %.  Counted on the meta device."""
    T = 5
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = VideoUNet(SVD_XT)
        tokens = unet.project_context(torch.empty(T, 1024), T)
        unet(torch.empty(T, 8, 72, 72), torch.empty(T), tokens, torch.empty(T, 768), T)
    assert counter.get_total_flops() / T / 1e12 == pytest.approx(1.646 * (1 - 0.041), abs=0.01)
