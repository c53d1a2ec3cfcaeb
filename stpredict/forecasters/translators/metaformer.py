"""The frame of all MetaFormer translators (SimVPv2, section 3.3): blocks that mix positions, then channels.

The first block works on all frames' channels, T·hid_S, and a 1x1 convolution after it makes hid_T of them; one after
the last block leads back. A translator is what its blocks are.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn


class MakesBlock(Protocol):
    def __call__(self, channels: int, index: int, drop_path: float) -> nn.Module:
        """The block at ``index``, ``(b, channels, h, w)`` → the same."""


class MetaFormer(nn.Module):
    """``(b, channels, h, w)`` → the same, through ``count`` blocks of which those between first and last have
    ``hidden`` channels.

    Drop path grows linearly from 0 in the first block to ``drop_path`` in the last. (Published code begins at 0.01,
    whatever the last one's.)
    """

    def __init__(self, make: MakesBlock, channels: int, hidden: int, count: int, drop_path: float):
        super().__init__()
        if count < 2:
            raise ValueError(f"a translator has at least 2 blocks, got {count}")
        widths = [channels, *[hidden] * (count - 1), channels]
        rates = [drop_path * index / (count - 1) for index in range(count)]
        self.blocks = nn.ModuleList(
            Stage(make(widths[index], index, rates[index]), widths[index], widths[index + 1]) for index in range(count)
        )

    @property
    def drop_rates(self) -> list[float]:
        """Of each residual branch, in the order of the forward pass: how likely it is left out in training."""
        return [module.rate for module in self.modules() if isinstance(module, Add)]

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """``kept``: by what each residual branch of each sample is multiplied, ``(branches, b)``; None: by 1."""
        if kept is None:
            for block in self.blocks:
                x = block(x)
            return x
        for block, part in zip(self.blocks, kept.split([block.branches for block in self.blocks]), strict=True):
            x = block(x, part)
        return x


class Stage(nn.Module):
    """A block of ``channels``, and the 1x1 convolution to those that come ``out``, where these are others."""

    def __init__(self, block: nn.Module, channels: int, out: int):
        super().__init__()
        self.block = block
        self.project = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.branches = sum(isinstance(module, Add) for module in block.modules())

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.project(self.block(x) if kept is None else self.block(x, kept))


class Block(nn.Module):
    """x + s₁ · mixer(norm(x)), then x + s₂ · mlp(norm(x)), on ``(b, c, h, w)``.

    ``norm`` makes the normalisation of so many channels. ``scale``: where the layer scales s (one value per channel,
    Touvron et al. 2021, arXiv:2103.17239) begin; None: there are none.
    """

    def __init__(
        self,
        channels: int,
        norm: Callable[[int], nn.Module],
        mixer: nn.Module,
        mlp: nn.Module,
        scale: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.norm1, self.mixer, self.add1 = norm(channels), mixer, Add(channels, scale, drop_path)
        self.norm2, self.mlp, self.add2 = norm(channels), mlp, Add(channels, scale, drop_path)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        first, second = (None, None) if kept is None else kept
        x = self.add1(x, self.mixer(self.norm1(x)), first)
        return self.add2(x, self.mlp(self.norm2(x)), second)


class Add(nn.Module):
    """A residual connection: ``x`` and what its branch says, both ``(b, c, h, w)``, with layer scale, and times
    ``kept`` ``(b,)``. ``rate``: how likely that is 0 in training, for who draws it (stpredict/layers/drop_path.py)."""

    def __init__(self, channels: int, scale: float | None, rate: float):
        super().__init__()
        self.scale = None if scale is None else nn.Parameter(torch.full((channels,), scale))
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor, kept: Tensor | None = None) -> Tensor:
        # The small tensors are multiplied: the large ones are gone through once.
        if kept is not None:
            kept = rearrange(kept, "b -> b 1 1 1")
        if self.scale is None:
            return x + branch if kept is None else torch.addcmul(x, branch, kept.to(branch.dtype))
        factor = rearrange(self.scale, "c -> 1 c 1 1")
        if kept is not None:
            factor = (factor * kept).to(factor.dtype)
        return torch.addcmul(x, branch, factor)
