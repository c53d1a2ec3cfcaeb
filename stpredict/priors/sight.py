"""Who sees whom among a prior's inputs: a prefix, a start, and blocks of tokens.

A token sees the prefix, its whole block and everything before it. Masks say that of blocks of one size; a sequence that
is not made of those alone is cut into parts that are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from stpredict.attention.attention import attention
from stpredict.attention.config import Backend
from stpredict.attention.masks import BlockCausal, pairs


@dataclass(frozen=True)
class Part:
    """The inputs ``start`` to ``stop - 1``: blocks of ``block`` inputs, counted from behind the first ``prefix`` ones,
    which all of them see."""

    start: int
    stop: int
    block: int
    prefix: int


@dataclass(frozen=True)
class Sight:
    """``backend`` computes the first part, which most sequences are whole. What follows it, behind a hybrid start and
    where the last blocks are smaller, and blocks that are decoded have keys before their first query, which not every
    backend knows: they take what can."""

    prefix: int
    parts: tuple[Part, ...]
    backend: Backend = "auto"

    @classmethod
    def of_blocks(
        cls,
        sizes: list[int],
        prefix: int = 0,
        start: int = 0,
        one_by_one: bool = False,
        backend: Backend = "auto",
    ) -> Self:
        """Of ``prefix`` inputs that see each other, ``start`` ones that are a block or follow each other
        ``one_by_one``, and blocks of ``sizes``, where smaller ones stand at the end."""
        regular = prefix + start + sizes[0] * sizes.count(sizes[0])
        begun = prefix + start if one_by_one else 0
        end = prefix + start + sum(sizes)
        parts = (
            Part(0, begun, 1, prefix),
            Part(begun, regular, sizes[0], prefix),
            Part(regular, end, sizes[-1], regular),
        )
        return cls(prefix, tuple(part for part in parts if part.stop > part.start), backend)

    def of(self, start: int, stop: int) -> Self:
        """Of these inputs alone: the first ones of the sequence, or else one block, or one input."""
        if start == 0:
            parts = (Part(p.start, min(p.stop, stop), p.block, p.prefix) for p in self.parts if p.start < stop)
        else:
            parts = (Part(start, stop, stop - self.prefix, self.prefix),)
        return Sight(self.prefix, tuple(parts), self.backend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prefix_lengths: Tensor | None) -> Tensor:
        """``q`` (b, heads, inputs of the parts, d), ``k`` and ``v`` (b, heads, all inputs so far, d).

        ``prefix_lengths`` (b): the inputs of each sample's prefix that are real, where some are not."""
        out, first = [], self.parts[0].start
        for part in self.parts if prefix_lengths is None else self._before_ragged():
            mask = BlockCausal(part.block, part.prefix, prefix_lengths)
            rows = q[:, :, part.start - first : part.stop - first]
            backend = "auto" if part.start else self.backend
            out.append(attention(rows, k[:, :, : part.stop], v[:, :, : part.stop], mask, backend))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _before_ragged(self) -> Iterator[Part]:
        """The same parts, all behind the prefix: smaller blocks one by one, each as if all before it were its own."""
        for part in self.parts:
            if part.prefix == self.prefix:
                yield part
            else:
                for stop in range(part.start + part.block, part.stop + 1, part.block):
                    yield Part(stop - part.block, stop, stop - self.prefix, self.prefix)

    @property
    def pairs(self) -> int:
        """How many inputs see each other, per sample; of a prefix all count."""
        return sum(pairs(BlockCausal(p.block, p.prefix), p.stop - p.start, p.stop) for p in self.parts)
