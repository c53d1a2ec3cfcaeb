"""The order in which a token grid is read: blocks in raster order (t, h, w), tokens in raster order inside."""

import torch
from einops import rearrange
from torch import Tensor


class BlockOrder:
    """Maps a token grid ``(T', H', W')`` to a sequence of blocks ``(T, H, W)`` and back.

    ``coordinates`` is (n, 3) int64: (t, h, w) of each token in sequence order.
    ValueError where the block does not divide the grid.
    """

    def __init__(self, grid: tuple[int, int, int], block: tuple[int, int, int]):
        if any(g % b for g, b in zip(grid, block, strict=True)):
            raise ValueError(f"block {_x(block)} does not divide the token grid {_x(grid)}")
        self.grid, self.block = tuple(grid), tuple(block)
        self.block_tokens = block[0] * block[1] * block[2]
        self.tokens = grid[0] * grid[1] * grid[2]
        axes = torch.meshgrid(*(torch.arange(g, device="cpu") for g in grid), indexing="ij")
        self.coordinates = self.to_sequence(torch.stack(axes, dim=0)).T.contiguous()

    def to_sequence(self, ids: Tensor) -> Tensor:
        """``(b, T', H', W')`` to ``(b, n)``."""
        t, h, w = self.block
        return rearrange(ids, "b (nt t) (nh h) (nw w) -> b (nt nh nw t h w)", t=t, h=h, w=w)

    def to_grid(self, sequence: Tensor) -> Tensor:
        """``(b, n)`` to ``(b, T', H', W')``."""
        (nt, nh, nw), (t, h, w) = (g // b for g, b in zip(self.grid, self.block, strict=True)), self.block
        pattern = "b (nt nh nw t h w) -> b (nt t) (nh h) (nw w)"
        return rearrange(sequence, pattern, nt=nt, nh=nh, nw=nw, t=t, h=h, w=w)


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
