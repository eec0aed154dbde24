import torch
import torch.nn.functional as F
from torch import nn

from d2.models.clip import MEAN, STD, OpenCLIP, Perceptron, SelfAttention, blur, preprocess


def test_self_attention_equals_its_twin_in_torch():
    ours, twin = SelfAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(ours.in_proj_weight, std=0.2)
    nn.init.normal_(ours.in_proj_bias, std=0.2)
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), twin(x, x, x)[0])


def test_the_perceptron_has_the_exact_gelu():
    perceptron, x = Perceptron(4, 8), torch.randn(5, 4)
    h = perceptron.c_fc(x)
    exact = perceptron.c_proj(h * 0.5 * (1 + torch.erf(h / 2**0.5)))
    torch.testing.assert_close(perceptron(x), exact, rtol=0, atol=1e-6)


def test_preprocessing_keeps_the_corners_and_normalises():
    image = torch.rand(1, 3, 5, 7) * 2 - 1  # grows, so nothing is blurred
    ours = preprocess(image, 16)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    corner = ((image[0, :, 0, 0] + 1) / 2 - mean) / std
    torch.testing.assert_close(ours[0, :, 0, 0], corner)
    assert ours.shape == (1, 3, 16, 16)


def test_preprocessing_blurs_only_where_the_picture_shrinks():
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    plain = F.interpolate(stripes, (16, 16), mode="bicubic", align_corners=True)
    ours = preprocess(stripes, 16) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert (ours * 2 - 1)[..., 4:-4, 4:-4].std() < 0.05 < plain[..., 4:-4, 4:-4].std()


def test_blur_equals_its_slow_twin():
    image = torch.randn(1, 2, 12, 9)
    factors = [3.0, 2.2]
    kernels = []
    for factor in factors:
        sigma = (factor - 1) / 2
        n = int(max(4 * sigma, 3))
        n += 1 - n % 2
        weight = torch.exp(-((torch.arange(n) - n // 2) ** 2) / (2 * sigma**2))
        kernels.append(weight / weight.sum())
    kernel = torch.outer(*kernels)
    h, w = (n // 2 for n in kernel.shape)
    padded = F.pad(image, (w, w, h, h), mode="reflect")
    slow = F.conv2d(padded, kernel.expand(2, 1, *kernel.shape), groups=2)
    torch.testing.assert_close(blur(image, factors), slow)


def test_the_embedding_is_the_class_tokens_and_does_not_depend_on_the_batch(clip_config):
    clip = OpenCLIP(clip_config).eval()
    for parameter in clip.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.rand(3, 3, 40, 40) * 2 - 1
    both = clip(images)
    assert both.shape == (3, clip_config.output_dim)
    torch.testing.assert_close(both[1:2], clip(images[1:2]))
