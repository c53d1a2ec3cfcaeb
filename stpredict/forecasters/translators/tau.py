"""Temporal attention unit (Tan et al. 2023, arXiv:2206.12126): attention within frames times attention among them."""

from einops import reduce
from torch import Tensor, nn

from stpredict.forecasters.config import TauConfig
from stpredict.forecasters.translators.convolutions import he_normal
from stpredict.forecasters.translators.large_kernel import LargeKernelAttention, large_kernel
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.layers.batch_norm import BatchNorm


class TemporalUnit(nn.Module):
    """``x`` times what a large kernel sees of it, times one weight per channel (squeeze and excitation, Hu et al.
    2018, arXiv:1709.01507): the channels are those of all frames."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = large_kernel(channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        squeezed = channels // max(channels // 16, 4)
        self.among_frames = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.among_frames(reduce(x, "b c h w -> b c", "mean"))
        return weights[:, :, None, None] * self.mix(self.spatial(x)) * x


def tau_block(config: TauConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same; 4 channels at least."""
    mixer = LargeKernelAttention(channels, TemporalUnit(channels))  # begins as torch has it, as published
    mlp = Mlp(channels, int(channels * config.mlp_ratio), spatial=True).apply(he_normal)
    return Block(channels, BatchNorm, mixer, mlp, scale=1e-2, drop_path=drop_path)
