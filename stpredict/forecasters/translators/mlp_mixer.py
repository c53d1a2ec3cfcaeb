"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601). Its weights are those of one grid."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.forecasters.config import MlpMixerConfig
from stpredict.forecasters.translators.convolutions import narrow_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.layers.channel_norm import ChannelNorm


class TokenMixer(nn.Module):
    """An MLP over the positions of the ``grid``, the same for every channel, on ``(b, c, h, w)``."""

    def __init__(self, grid: tuple[int, int], hidden: int):
        super().__init__()
        height, width = grid
        self.expand = nn.Linear(height * width, hidden)
        self.contract = nn.Linear(hidden, height * width)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        x = self.contract(F.gelu(self.expand(rearrange(x, "b c h w -> b c (h w)"))))
        return rearrange(x, "b c (h w) -> b c h w", h=height)


def mlp_mixer_block(config: MlpMixerConfig, channels: int, drop_path: float, grid: tuple[int, int]) -> nn.Module:
    """``(b, channels, h, w)`` → the same, (h, w) being ``grid``."""
    mlp = Mlp(channels, int(channels * config.mlp_ratio))
    block = Block(channels, ChannelNorm, TokenMixer(grid, channels // 2), mlp, scale=None, drop_path=drop_path)
    return block.apply(narrow_normal)
