"""Layers with a faster form against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from d2.models.blocks import TimeConv


@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 1, 1), (3, 3, 3), (1, 1, 1)])
def test_a_time_convolution_equals_the_3d_one(kernel):
    torch.manual_seed(0)
    conv = TimeConv(6, 4, kernel, padding=tuple(k // 2 for k in kernel))
    x = torch.randn(2, 6, 5, 3, 4)
    twin = F.conv3d(x, conv.weight, conv.bias, padding=conv.padding)
    torch.testing.assert_close(conv(x), twin, rtol=1e-5, atol=1e-5)


def test_the_skips_of_a_temporal_block_keep_their_names():
    assert set(TimeConv(4, 8, 1).state_dict()) == {"weight", "bias"}
    assert TimeConv(4, 8, 1)(torch.randn(1, 4, 2, 3, 3)).shape == (1, 8, 2, 3, 3)
