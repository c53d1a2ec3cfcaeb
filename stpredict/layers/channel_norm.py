"""Layer normalisation of every position's channels."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """``(b, c, h, w)`` → the same. In channels-last tensors nothing is moved."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c h w -> b h w c")
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return rearrange(x, "b h w c -> b c h w")
