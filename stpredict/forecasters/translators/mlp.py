"""The MLP of a block: 1x1 convolutions, with a depth-wise 3x3 between them in some translators."""

import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.forecasters.translators.convolutions import depthwise


class Mlp(nn.Module):
    """``(b, c, h, w)`` → the same, over ``hidden`` channels with GELU.

    ``spatial``: a depth-wise 3x3 convolution goes before the GELU (VAN's MLP, Guo et al. 2022, arXiv:2202.09741).
    """

    def __init__(self, channels: int, hidden: int, spatial: bool = False):
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.spatial = depthwise(hidden, 3) if spatial else nn.Identity()
        self.contract = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.spatial(self.expand(x))))
