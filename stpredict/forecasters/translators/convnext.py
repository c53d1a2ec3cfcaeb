"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545)."""

from torch import Tensor, nn

from stpredict.forecasters.config import ConvNextConfig
from stpredict.forecasters.translators.convolutions import depthwise, he_normal
from stpredict.forecasters.translators.metaformer import Add
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.layers.channel_norm import ChannelNorm


class ConvNextBlock(nn.Module):
    """``(b, c, h, w)`` → the same: a depth-wise 7x7 and an MLP in one residual branch."""

    def __init__(self, config: ConvNextConfig, channels: int, drop_path: float):
        super().__init__()
        self.spatial, self.norm = depthwise(channels, 7), ChannelNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.add = Add(channels, 1e-6, drop_path)
        self.apply(he_normal)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.add(x, self.mlp(self.norm(self.spatial(x))), None if kept is None else kept[0])
