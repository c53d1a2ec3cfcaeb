"""Attention by large kernels (VAN, Guo et al. 2022, arXiv:2202.09741): what gSTA, VAN and TAU have in common."""

import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.forecasters.translators.convolutions import depthwise


def large_kernel(channels: int) -> nn.Sequential:
    """A depth-wise 21x21 in two: 5x5, then 7x7 at every third position."""
    return nn.Sequential(depthwise(channels, 5), depthwise(channels, 7, dilation=3))


class LargeKernelAttention(nn.Module):
    """``unit`` between two 1x1 convolutions, with a shortcut, on ``(b, c, h, w)``."""

    def __init__(self, channels: int, unit: nn.Module):
        super().__init__()
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.unit = unit
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project_out(self.unit(F.gelu(self.project_in(x))))
