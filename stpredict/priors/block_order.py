"""The order in which a token grid is read: blocks in raster order (t, h, w), tokens in raster order inside.

Where a block's T does not divide the grid's T', the paper pads the grid at its end (5 latent frames to 6 for 2x1x8).
Nobody attends to padding, it carries no loss and is not sampled; so it is not in the sequence at all: the blocks of the
last latent frames hold fewer tokens. Time comes first inside a block, so token j of such a block still stands at the
place of token j of a whole one.
"""

from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor


class BlockOrder:
    """Maps a token grid ``(T', H', W')`` to a sequence of blocks ``(T, H, W)`` and back.

    ``coordinates`` is (n, 3) int64: (t, h, w) of each token in sequence order; ``sizes`` is how many tokens each block
    holds and ``ends`` where it ends. ValueError where the block's height or width does not divide the grid.
    """

    def __init__(self, grid: tuple[int, int, int], block: tuple[int, int, int]):
        if grid[1] % block[1] or grid[2] % block[2]:
            raise ValueError(
                f"block {_x(block)} does not divide the token grid {_x(grid)}: height and width must (time is padded)"
            )
        self.grid, self.block = tuple(grid), tuple(block)
        self.tokens = grid[0] * grid[1] * grid[2]
        # Latent frames of whole blocks, and those of the blocks that would be padded.
        self._parts = [part for part in (grid[0] - grid[0] % block[0], grid[0] % block[0]) if part]
        self.sizes: list[int] = []
        for frames, (t, h, w) in self._shapes():
            self.sizes += [t * h * w] * (frames * grid[1] * grid[2] // (t * h * w))
        self.ends = list(accumulate(self.sizes))
        self.block_tokens = self.sizes[0]
        axes = torch.meshgrid(*(torch.arange(g, device="cpu") for g in grid), indexing="ij")
        self.coordinates = self.to_sequence(torch.stack(axes, dim=0)).T.contiguous()

    def blocks_in(self, tokens: int) -> int:
        """How many blocks the first ``tokens`` tokens of the sequence are; 0 where they are not whole blocks."""
        return self.ends.index(tokens) + 1 if tokens in self.ends else 0

    def to_sequence(self, ids: Tensor) -> Tensor:
        """``(b, T', H', W')`` to ``(b, n)``."""
        pattern = "b (nt t) (nh h) (nw w) -> b (nt nh nw t h w)"
        parts = zip(ids.split(self._parts, dim=1), self._shapes(), strict=True)
        return torch.cat([rearrange(part, pattern, t=t, h=h, w=w) for part, (_, (t, h, w)) in parts], dim=1)

    def to_grid(self, sequence: Tensor) -> Tensor:
        """``(b, n)`` to ``(b, T', H', W')``."""
        pattern = "b (nt nh nw t h w) -> b (nt t) (nh h) (nw w)"
        _, height, width = self.grid
        parts = sequence.split([frames * height * width for frames in self._parts], dim=1)
        grids = [
            rearrange(part, pattern, nh=height // h, nw=width // w, t=t, h=h, w=w)
            for part, (_, (t, h, w)) in zip(parts, self._shapes(), strict=True)
        ]
        return torch.cat(grids, dim=1)

    def _shapes(self) -> list[tuple[int, tuple[int, int, int]]]:
        """Latent frames of each part, and the shape of its blocks."""
        return [(frames, (min(self.block[0], frames), *self.block[1:])) for frames in self._parts]


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
