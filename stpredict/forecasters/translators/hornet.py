"""HorNet (Rao et al. 2022, arXiv:2207.14284): convolutions multiplied with each other, four times in a row."""

from torch import Tensor, nn

from stpredict.forecasters.config import HorNetConfig
from stpredict.forecasters.translators.convolutions import depthwise, he_normal, narrow_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.layers.channel_norm import ChannelNorm

ORDER = 4


class RecursiveGatedConvolution(nn.Module):
    """gⁿConv (section 3.1): p₁ = q · dw₁, then pₙ₊₁ = mixₙ(pₙ) · dwₙ₊₁, of as many channels as x at the end and half
    as many at each step before. ``(b, c, h, w)`` → the same; c is a multiple of 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.widths = [channels // 2**step for step in reversed(range(ORDER))]
        self.project_in = nn.Conv2d(channels, 2 * channels, 1)
        self.spatial = depthwise(sum(self.widths), 7)
        self.mixes = nn.ModuleList(
            nn.Conv2d(before, after, 1) for before, after in zip(self.widths, self.widths[1:], strict=False)
        )
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, others = self.project_in(x).split([self.widths[0], sum(self.widths)], dim=1)
        first, *factors = self.spatial(others).split(self.widths, dim=1)
        p = p * first
        for mix, factor in zip(self.mixes, factors, strict=True):
            p = mix(p) * factor
        return self.project_out(p)


def hornet_block(config: HorNetConfig, channels: int, drop_path: float) -> nn.Module:
    """``(b, channels, h, w)`` → the same; channels a multiple of 8."""
    mixer = RecursiveGatedConvolution(channels).apply(he_normal)
    mlp = Mlp(channels, int(channels * config.mlp_ratio)).apply(narrow_normal)
    return Block(channels, ChannelNorm, mixer, mlp, scale=1e-6, drop_path=drop_path)
