"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), without embeddings of positions."""

from functools import partial

from torch import nn

from stpredict.forecasters.config import VitConfig
from stpredict.forecasters.translators.convolutions import narrow_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.forecasters.translators.self_attention import SelfAttention
from stpredict.layers.channel_norm import ChannelNorm


def vit_block(config: VitConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same; channels a multiple of 8."""
    norm = partial(ChannelNorm, eps=1e-5)
    mlp = Mlp(channels, int(channels * config.mlp_ratio))
    block = Block(channels, norm, SelfAttention(channels), mlp, scale=None, drop_path=drop_path)
    return block.apply(narrow_normal)
