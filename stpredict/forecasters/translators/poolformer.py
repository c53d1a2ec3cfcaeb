"""PoolFormer (Yu et al. 2022, arXiv:2111.11418): positions are mixed by averages alone."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.forecasters.config import PoolFormerConfig
from stpredict.forecasters.translators.convolutions import narrow_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp


class Pooling(nn.Module):
    """The mean of 3x3 positions, of those that are in the frame, less the position itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x


def poolformer_block(config: PoolFormerConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same."""
    norm = partial(nn.GroupNorm, 1)
    mlp = Mlp(channels, int(channels * config.mlp_ratio)).apply(narrow_normal)
    return Block(channels, norm, Pooling(), mlp, scale=1e-5, drop_path=drop_path)
