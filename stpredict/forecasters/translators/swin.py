"""Swin transformer (Liu et al. 2021, arXiv:2103.14030): attention within windows, shifted in every other block."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stpredict.forecasters.config import SwinConfig
from stpredict.forecasters.translators.convolutions import narrow_normal
from stpredict.forecasters.translators.metaformer import Block
from stpredict.forecasters.translators.mlp import Mlp
from stpredict.forecasters.translators.self_attention import HEADS
from stpredict.layers.channel_norm import ChannelNorm


def window_side(grid: tuple[int, int]) -> int:
    """7 where that divides the height, else a sixteenth of it, 4 to 8; never more than the grid has."""
    height, width = grid
    side = 7 if height % 7 == 0 else min(8, max(4, height // 16))
    return min(side, height, width)


class WindowAttention(nn.Module):
    """``(b, c, h, w)`` on ``grid`` → the same; c is a multiple of 8, the number of heads.

    ``shift`` moves the windows by as many positions, so that those at the lower and right edge hold both ends of the
    frame. ``masked``: ends do not see each other. Of a grid that windows do not divide, the last ones are partly
    empty: nothing sees what is not there, and without a mask the ends meet over the empty rest.
    """

    def __init__(self, channels: int, grid: tuple[int, int], window: int, shift: int, masked: bool):
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, HEADS), std=0.02))
        self.register_buffer("offsets", _offsets(window), persistent=False)
        self.register_buffer("sees", self._sees(masked), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), p = self.grid, self.window
        x = rearrange(x, "b c h w -> b h w c")
        if self._empty != (0, 0):
            x = F.pad(x, (0, 0, 0, self._empty[1], 0, self._empty[0]))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        rows = x.shape[1] // p
        x = self.qkv(rearrange(x, "b (i p) (j q) c -> b (i j) (p q) c", p=p, q=p))
        q, k, v = rearrange(x, "b n l (three heads d) -> three b (n heads) l d", three=3, heads=HEADS)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(q))
        x = self.out(rearrange(x, "b (n heads) l d -> b n l (heads d)", heads=HEADS))
        x = rearrange(x, "b (i j) (p q) c -> b (i p) (j q) c", i=rows, p=p)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return rearrange(x[:, :height, :width], "b h w c -> b c h w")

    @property
    def _empty(self) -> tuple[int, int]:
        """Rows and columns that the windows have and the grid does not."""
        height, width = self.grid
        return -height % self.window, -width % self.window

    def _mask(self, q: Tensor) -> Tensor:
        """``(1, windows * heads, l, l)`` in ``q``'s type, to be added to the scores."""
        windows = q.shape[1] // HEADS
        bias = rearrange(self.bias[self.offsets], "l m heads -> 1 heads l m").to(q.dtype).expand(windows, -1, -1, -1)
        if self.sees is not None:
            bias = bias.masked_fill(~self.sees[:, None], float("-inf"))
        return rearrange(bias, "n heads l m -> 1 (n heads) l m")

    def _sees(self, masked: bool) -> Tensor | None:
        """Bool ``(windows, l, l)``: who sees whom; None where all do. What is empty sees what is empty: a row of the
        softmax needs something."""
        height, width = self.grid
        across = self.shift if masked else 0  # rows and columns that the shift brings to the other end
        row = torch.arange(height + self._empty[0])[:, None]
        column = torch.arange(width + self._empty[1])[None]
        region = 4 * ((row >= height) | (column >= width)) + 2 * (row < across) + (column < across)
        region = rearrange(
            region.roll((-self.shift, -self.shift), dims=(0, 1)),
            "(i p) (j q) -> (i j) (p q)",
            p=self.window,
            q=self.window,
        )
        if not across and self._empty == (0, 0):
            return None
        return region[:, :, None] == region[:, None]


def _offsets(window: int) -> Tensor:
    """Int64 ``(l, l)``: the number of the offset, in rows and columns, of each position of a window to each other."""
    side = torch.arange(window)
    row, column = side.repeat_interleave(window), side.repeat(window)
    down, right = (x[:, None] - x[None] + window - 1 for x in (row, column))
    return down * (2 * window - 1) + right


def swin_block(config: SwinConfig, channels: int, drop_path: float, grid: tuple[int, int], shifted: bool) -> nn.Module:
    """``(b, channels, h, w)`` → the same, (h, w) being ``grid``; channels a multiple of 8.
    ``shifted``: by half a window."""
    window = window_side(grid)
    shift = window // 2 if shifted and min(grid) > window else 0
    mixer = WindowAttention(channels, grid, window, shift, config.masked)
    mlp = Mlp(channels, int(channels * config.mlp_ratio))
    norm = partial(ChannelNorm, eps=1e-5)
    return Block(channels, norm, mixer, mlp, scale=None, drop_path=drop_path).apply(narrow_normal)
