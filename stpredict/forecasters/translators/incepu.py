"""IncepU, SimVP's first translator (Gao et al. 2022, arXiv:2206.05099, section 3.2): Inception blocks in a U."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpredict.forecasters.config import IncepUConfig


class IncepU(nn.Module):
    """``(b, channels, h, w)`` → the same, through ``depth`` blocks and as many again, which also see what the blocks
    before the middle said, the last of them first. The grid stays as it is."""

    drop_rates = ()  # it has no residual branches

    def __init__(self, config: IncepUConfig, channels: int, hidden: int, depth: int):
        super().__init__()
        if depth < 2:
            raise ValueError(f"a U has a depth of at least 2, got {depth}")
        self.depth = depth
        ins = [channels, *[hidden] * depth, *[2 * hidden] * (depth - 1)]
        outs = [*[hidden] * (2 * depth - 1), channels]
        self.blocks = nn.ModuleList(Inception(config, *widths, hidden // 2) for widths in zip(ins, outs, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for block in self.blocks[: self.depth]:
            x = block(x)
            seen.append(x)
        seen.pop()  # the middle itself
        x = self.blocks[self.depth](x)
        for block in self.blocks[self.depth + 1 :]:
            x = block(torch.cat([x, seen.pop()], dim=1))
        return x


class Inception(nn.Module):
    """A 1x1 to ``squeezed`` channels, then the sum of grouped convolutions of several sizes."""

    def __init__(self, config: IncepUConfig, channels: int, out: int, squeezed: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.branches = nn.ModuleList(Branch(squeezed, out, kernel, config.groups) for kernel in config.kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        first, *others = self.branches
        out = first(x)
        for branch in others:
            out = out + branch(x)
        return out


class Branch(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding="same", groups=groups)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2, inplace=True)
