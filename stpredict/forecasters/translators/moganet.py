"""MogaNet (Li et al. 2024, arXiv:2211.03295): convolutions of three reaches, gated, and an MLP that sets its channels
against what they have in common."""

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from stpredict.forecasters.config import MogaNetConfig
from stpredict.forecasters.translators.convolutions import depthwise, he_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.layers.batch_norm import BatchNorm


class Contrast(nn.Module):
    """``x`` + s · (``x`` - ``common``), with one learned s per channel, on ``(b, c, h, w)``."""

    def __init__(self, channels: int):
        super().__init__()
        self.sigma = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x: Tensor, common: Tensor) -> Tensor:
        return x + self.sigma[:, None, None] * (x - common)


class MultiOrderConvolution(nn.Module):
    """A depth-wise 5x5 of all channels; 3/8 of them go through another, dilated by 2, and 4/8 through a 7x7, dilated
    by 3. ``(b, c, h, w)`` → the same; c is a multiple of 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.widths = [channels // 8, channels * 3 // 8, channels // 2]
        self.near = depthwise(channels, 5)
        self.middle = depthwise(self.widths[1], 5, dilation=2)
        self.far = depthwise(self.widths[2], 7, dilation=3)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        near, middle, far = self.near(x).split(self.widths, dim=1)
        return self.mix(torch.cat([near, self.middle(middle), self.far(far)], dim=1))


class GatedAggregation(nn.Module):
    """The spatial half (section 4.2), ``(b, c, h, w)`` → the same, with a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.contrast = Contrast(channels)
        self.gate = nn.Conv2d(channels, channels, 1)
        self.value = MultiOrderConvolution(channels)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project_in(x)
        y = F.silu(self.contrast(y, reduce(y, "b c h w -> b c 1 1", "mean")))
        return x + self.project_out(F.silu(self.gate(y)) * F.silu(self.value(y)))


class ChannelAggregation(nn.Module):
    """The MLP (section 4.3), ``(b, c, h, w)`` → the same."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.spatial = depthwise(hidden, 3)
        self.common = nn.Conv2d(hidden, 1, 1)
        self.contrast = Contrast(hidden)
        self.contract = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.spatial(self.expand(x)))
        return self.contract(self.contrast(x, F.gelu(self.common(x))))


def moganet_block(config: MogaNetConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same; channels a multiple of 8."""
    mlp = ChannelAggregation(channels, int(channels * config.mlp_ratio))
    block = Block(channels, BatchNorm, GatedAggregation(channels), mlp, scale=1e-5, drop_path=drop_path)
    return block.apply(he_normal)
