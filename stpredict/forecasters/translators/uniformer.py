"""UniFormer (Li et al. 2022, arXiv:2201.09450): local blocks of convolutions first and last, attention between."""

from functools import partial

from torch import Tensor, nn

from stpredict.forecasters.config import UniFormerConfig
from stpredict.forecasters.translators.convolutions import depthwise, he_normal, narrow_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.forecasters.translators.self_attention import SelfAttention
from stpredict.layers.batch_norm import BatchNorm
from stpredict.layers.channel_norm import ChannelNorm


class Positioned(nn.Module):
    """A depth-wise 3x3, which tells positions apart by the edges, and then ``block``."""

    def __init__(self, channels: int, block: Block):
        super().__init__()
        self.position = depthwise(channels, 3)
        self.block = block

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.block(x + self.position(x), kept)


def uniformer_block(config: UniFormerConfig, channels: int, drop_path: float, local: bool) -> nn.Module:
    """``(b, channels, h, w)`` → the same; channels a multiple of 8. ``local``: convolution in place of attention."""
    mlp = Mlp(channels, int(channels * config.mlp_ratio))
    if local:
        mixer = nn.Sequential(
            nn.Conv2d(channels, channels, 1), depthwise(channels, 5), nn.Conv2d(channels, channels, 1)
        )
        block = Block(channels, BatchNorm, mixer, mlp, scale=None, drop_path=drop_path)
        return Positioned(channels, block).apply(he_normal)
    norm = partial(ChannelNorm, eps=1e-5)
    block = Block(channels, norm, SelfAttention(channels), mlp, scale=1e-6, drop_path=drop_path)
    return Positioned(channels, block.apply(narrow_normal))
