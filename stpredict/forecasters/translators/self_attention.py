"""Self-attention of all positions of the grid."""

from einops import rearrange
from torch import Tensor, nn

from stpredict.attention.attention import attention
from stpredict.attention.masks import Full

HEADS = 8


class SelfAttention(nn.Module):
    """``(b, c, h, w)`` → the same; c is a multiple of 8, the number of heads. It knows no positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        x = self.qkv(rearrange(x, "b c h w -> b (h w) c"))
        q, k, v = rearrange(x, "b n (three heads d) -> three b heads n d", three=3, heads=HEADS)
        x = self.out(rearrange(attention(q, k, v, Full()), "b heads n d -> b n (heads d)"))
        return rearrange(x, "b (h w) c -> b c h w", h=height)
