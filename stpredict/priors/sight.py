"""Who sees whom among a prior's inputs: a token sees its whole block and everything before it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from stpredict.attention.attention import attention
from stpredict.attention.config import Backend
from stpredict.attention.masks import BlockCausal
from stpredict.attention.staircase import staircase_attention


@dataclass(frozen=True)
class Sight:
    """Row i sees the inputs before ``limits[i]``. The first ``regular`` rows are blocks of ``block`` inputs, for which
    there is a mask; blocks of the last latent frames may be smaller (``BlockOrder``)."""

    limits: tuple[int, ...]
    block: int
    regular: int
    backend: Backend = "auto"

    @classmethod
    def of_blocks(cls, sizes: Sequence[int], backend: Backend = "auto") -> Self:
        """Of blocks of ``sizes`` inputs, where smaller ones stand at the end; ``backend`` computes the mask."""
        limits: list[int] = []
        for size in sizes:
            limits += [len(limits) + size] * size
        return cls(tuple(limits), sizes[0], sizes[0] * sizes.count(sizes[0]), backend)

    def of(self, rows: slice) -> Self:
        """Of these rows alone. Those from the first on are a sequence of their own, others are to be one block."""
        regular = min(self.regular, rows.stop) if rows.start == 0 else 0
        return replace(self, limits=self.limits[rows], regular=regular)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` (b, heads, rows, d), ``k`` and ``v`` (b, heads, inputs up to the last row's limit, d)."""
        out, n = [], self.regular
        if n:
            out.append(attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], BlockCausal(self.block), self.backend))
        if n < q.shape[2]:
            out.append(staircase_attention(q[:, :, n:], k, v, self.limits[n:]))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)
