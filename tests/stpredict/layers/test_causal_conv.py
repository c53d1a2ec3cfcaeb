import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from stpredict.layers.causal_conv import (
    CausalConv3d,
    CausalDownsample,
    CausalUpsample,
    FrameGroupNorm,
    ResidualBlock,
    ScaledSwish,
)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_convolution_equals_its_sum_over_replicated_edges(stride):
    conv = CausalConv3d(2, 3, stride=stride).double()
    x = torch.randn(1, 2, 5, 6, 6, dtype=torch.float64)
    out = conv(x)
    for t, h, w in [(0, 0, 0), (1, 2, 1), (out.shape[2] - 1, out.shape[3] - 1, 0)]:
        expected = conv.bias.clone()
        for dt in range(3):
            for dh in range(3):
                for dw in range(3):
                    at = (t * stride[0] + dt - 2, h * stride[1] + dh - 1, w * stride[2] + dw - 1)
                    frame, row, column = (min(max(i, 0), n - 1) for i, n in zip(at, (5, 6, 6), strict=True))
                    expected += conv.weight[:, :, dt, dh, dw] @ x[0, :, frame, row, column]
        torch.testing.assert_close(out[0, :, t, h, w], expected)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_a_convolution_starts_as_an_orthogonal_map_of_the_newest_taps_with_a_little_noise(stride):
    torch.manual_seed(0)
    conv = CausalConv3d(4, 48, stride=stride)
    t, h, w = stride
    kept = conv.weight[:, :, 3 - t :, 1 : 1 + h, 1 : 1 + w]
    matrix = kept.flatten(1).detach()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1]), atol=0.15, rtol=0)
    assert 0 < conv.weight[:, :, 3 - t - 1].std() < 0.02
    assert not conv.bias.any()


def test_down_and_upsampling_keep_the_first_frame_apart():
    x = torch.randn(1, 4, 17, 8, 8)
    small = CausalDownsample(4, (2, 2, 2))(x)
    assert small.shape == (1, 4, 9, 4, 4)
    assert CausalUpsample(4, (2, 2, 2))(small).shape == x.shape


def test_upsampling_splits_channels_as_time_height_width_channel():
    up = CausalUpsample(2, (2, 2, 2))
    x = torch.randn(1, 2, 3, 4, 4)
    dense, out = up.conv(x), up(x)
    for frame, row, column in [(1, 1, 2), (2, 3, 0), (4, 7, 7)]:
        full = frame + 1  # before the first frame was dropped
        part = ((full % 2) * 2 + row % 2) * 2 + column % 2
        expected = dense[0, part * 2 : part * 2 + 2, full // 2, row // 2, column // 2]
        torch.testing.assert_close(out[0, :, frame, row, column], expected)


def test_norm_uses_one_frame_at_a_time():
    norm = FrameGroupNorm(2, 4)
    x = torch.randn(2, 4, 3, 5, 5)
    expected = torch.stack([F.group_norm(x[:, :, t], 2) for t in range(3)], dim=2)
    torch.testing.assert_close(norm(x), expected)


def test_swish_slope_is_per_channel():
    swish = ScaledSwish(2)
    x = torch.randn(1, 2, 2, 2, 2)
    torch.testing.assert_close(swish(x), F.silu(x))
    with torch.no_grad():
        swish.slope[1] = 0.0
    torch.testing.assert_close(swish(x)[:, 1], x[:, 1] / 2)
    torch.testing.assert_close(swish(x)[:, 0], F.silu(x)[:, 0])


def test_residual_block_of_zero_convolutions_is_its_shortcut():
    block = ResidualBlock(4, 8, groups=2)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 4, 2, 3, 3)
    matrix = block.shortcut.weight[:, :, 0, 0, 0]
    expected = rearrange(x, "b c t h w -> b t h w c") @ matrix.T + block.shortcut.bias
    torch.testing.assert_close(block(x), rearrange(expected, "b t h w c -> b c t h w"))
