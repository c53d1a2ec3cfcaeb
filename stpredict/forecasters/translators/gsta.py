"""Gated spatiotemporal attention, SimVPv2's own translator (Tan et al. 2022, arXiv:2211.12509, section 3.3)."""

from torch import Tensor, nn

from stpredict.forecasters.config import GstaConfig
from stpredict.forecasters.translators.convolutions import he_normal
from stpredict.forecasters.translators.large_kernel import LargeKernelAttention, large_kernel
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.layers.batch_norm import BatchNorm


class Gate(nn.Module):
    """sigmoid(g) · f, where f and g are one half each of what a large kernel sees."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = large_kernel(channels)
        self.mix = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        f, g = self.mix(self.spatial(x)).chunk(2, dim=1)
        return g.sigmoid() * f


def gsta_block(config: GstaConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same."""
    mixer = LargeKernelAttention(channels, Gate(channels))
    mlp = Mlp(channels, int(channels * config.mlp_ratio), spatial=True)
    return Block(channels, BatchNorm, mixer, mlp, scale=1e-2, drop_path=drop_path).apply(he_normal)
