"""Visual attention network (Guo et al. 2022, arXiv:2202.09741)."""

from torch import Tensor, nn

from stpredict.forecasters.config import VanConfig
from stpredict.forecasters.translators.convolutions import he_normal
from stpredict.forecasters.translators.large_kernel import LargeKernelAttention, large_kernel
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.layers.batch_norm import BatchNorm


class Weighted(nn.Module):
    """``x`` times what a large kernel sees of it."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = large_kernel(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mix(self.spatial(x))


def van_block(config: VanConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same."""
    mixer = LargeKernelAttention(channels, Weighted(channels))
    mlp = Mlp(channels, int(channels * config.mlp_ratio), spatial=True)
    return Block(channels, BatchNorm, mixer, mlp, scale=1e-2, drop_path=drop_path).apply(he_normal)
