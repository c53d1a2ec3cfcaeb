"""ConvMixer (Trockman & Kolter 2022, arXiv:2201.09792). It has neither MLP nor drop path."""

import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.forecasters.translators.convolutions import depthwise, he_normal
from stpredict.layers.batch_norm import BatchNorm


class ConvMixerBlock(nn.Module):
    """``(b, c, h, w)`` → the same: a depth-wise 11x11 with a shortcut, then a 1x1."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial, self.norm1 = depthwise(channels, 11), BatchNorm(channels)
        self.mix, self.norm2 = nn.Conv2d(channels, channels, 1), BatchNorm(channels)
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(F.gelu(self.spatial(x)))
        return self.norm2(F.gelu(self.mix(x)))
