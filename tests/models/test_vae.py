import torch
from einops import rearrange
from torch import nn

from d2.models.vae import SCALE_FACTOR, Downsample, FirstStage, KLAutoencoder, VideoDecoder, VideoResnetBlock


def frozen(module):
    for name, parameter in module.named_parameters():
        if name.endswith("mix_factor") or parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return module.eval().requires_grad_(False)


def test_the_video_decoder_mixes_the_opposite_way_from_the_unet():
    block = frozen(VideoResnetBlock(32, 32, (3, 1, 1)))
    x = torch.randn(3, 32, 2, 2)
    nn.init.constant_(block.mix_factor, 2.0)
    a = torch.sigmoid(torch.tensor(2.0))
    spatial = super(VideoResnetBlock, block).forward(x, 3)
    clips = rearrange(spatial, "(b t) c h w -> b c t h w", t=3)
    temporal = rearrange(block.time_stack(clips), "b c t h w -> (b t) c h w")
    torch.testing.assert_close(block(x, 3), a * temporal + (1 - a) * spatial)


def test_group_norms_of_the_autoencoder_have_the_eps_of_the_reference(vae_config):
    for name, module in FirstStage(vae_config, video=True).named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == (1e-5 if "time_stack" in name else 1e-6), name


def test_downsampling_pads_at_the_right_and_at_the_bottom():
    down = frozen(Downsample(1))
    for parameter in down.parameters():
        nn.init.zeros_(parameter)
    down.conv.weight[0, 0, 0, 0] = 1  # the top left of the kernel
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[..., ::2, ::2])


def test_the_conditioning_latent_is_the_mean_and_not_scaled(vae_config):
    vae = frozen(KLAutoencoder(vae_config))
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(vae.mode(image), vae.quant_conv(vae.encoder(image))[:, :4])


def test_a_sampled_latent_is_scaled_and_follows_the_noise(vae_config):
    stage = frozen(FirstStage(vae_config, video=True))
    image, noise = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    mean, log_variance = stage.encoder(image).chunk(2, 1)
    torch.testing.assert_close(stage.encode(image, torch.zeros_like(noise)), SCALE_FACTOR * mean)
    std = (0.5 * log_variance).exp()
    torch.testing.assert_close(stage.encode(image, noise), SCALE_FACTOR * (mean + std * noise))


def test_decoding_in_chunks_sees_time_within_a_chunk_only(vae_config):
    stage = frozen(FirstStage(vae_config, video=True))
    z = torch.randn(5, 4, 4, 4)
    parts = [stage.decoder(part / SCALE_FACTOR, len(part)) for part in z.split(2)]
    torch.testing.assert_close(stage.decode(z, chunk=2), torch.cat(parts))
    assert not torch.allclose(stage.decode(z, chunk=2), stage.decode(z, chunk=5), atol=1e-4)


def test_the_image_decoder_gives_the_same_for_any_chunk(vae_config):
    stage = frozen(FirstStage(vae_config, video=False))
    z = torch.randn(5, 4, 4, 4)
    torch.testing.assert_close(stage.decode(z, chunk=2), stage.decode(z, chunk=5), rtol=1e-4, atol=1e-5)


def test_the_video_decoders_output_also_looks_along_time(vae_config):
    decoder = frozen(VideoDecoder(vae_config))
    for name, parameter in decoder.named_parameters():
        if name.endswith("mix_factor"):
            nn.init.constant_(parameter, -50.0)  # the residual blocks look at space only
    z = torch.randn(3, 4, 4, 4)
    other = z.clone()
    other[2] += 1
    changed = (decoder(z, 3) != decoder(other, 3)).flatten(1).any(1)
    assert changed.tolist() == [False, True, True]


def test_a_latent_has_one_pixel_for_each_factor(vae_config):
    stage = frozen(FirstStage(vae_config, video=True))
    assert stage.encoder(torch.zeros(1, 3, 12, 8)).shape == (
        1,
        8,
        12 // vae_config.factor,
        8 // vae_config.factor,
    )
    assert stage.decode(torch.zeros(2, 4, 6, 4)).shape == (2, 3, 12, 8)
