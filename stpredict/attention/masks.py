"""Descriptions of who attends to whom. A mask is never a dense tensor outside the reference.

Sizes count tokens in sequence order. Where there are fewer queries than keys, as in decoding with a cache, the queries
are the sequence's last tokens.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Full:
    """Every query sees every key: within a block while decoding, and in encoders."""


@dataclass(frozen=True)
class Causal:
    """Token i sees tokens 0..i: block size 1."""


@dataclass(frozen=True)
class Window:
    """Token i sees the last ``size`` tokens up to itself."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a window of {self.size} tokens; it has at least 1, the token itself")


@dataclass(frozen=True)
class BlockCausal:
    """Every token sees its whole block and all earlier ones; a bidirectional ``prefix`` is seen by all.

    The sequence is ``prefix`` tokens, then blocks of ``block`` tokens, of which the last may be shorter. The prefix
    sees only itself. Padding neither attends nor is attended, and its outputs are 0: what follows the first
    ``prefix_lengths`` ``(b)`` tokens of each sample's prefix, and what follows the sequence's first ``length`` tokens.
    """

    block: int
    prefix: int = 0
    prefix_lengths: Tensor | None = field(default=None, compare=False)
    length: int | None = None

    def __post_init__(self):
        if self.block < 1 or self.prefix < 0:
            raise ValueError(f"blocks of {self.block} tokens after a prefix of {self.prefix}: sizes count tokens")
        if self.prefix_lengths is not None and self.prefix_lengths.ndim != 1:
            raise ValueError(
                f"prefix_lengths holds one number per sample, got shape {tuple(self.prefix_lengths.shape)}"
            )
        if self.length is not None and self.length < self.prefix:
            raise ValueError(f"length {self.length} counts the prefix of {self.prefix} too")

    def end(self, token: int) -> int:
        """Where the tokens end that ``token`` sees; the sequence's own end aside."""
        if token < self.prefix:
            return self.prefix
        return token + self.block - (token - self.prefix) % self.block


Mask = Full | Causal | Window | BlockCausal


def simplest(mask: Mask, queries: int, keys: int) -> Mask:
    """``mask``, or the simpler one that says the same of the last ``queries`` of ``keys`` tokens."""
    if queries > keys:
        raise ValueError(f"{queries} queries of {keys} keys: the queries are the last tokens of the keys' sequence")
    first = keys - queries
    match mask:
        case Window(size) if size >= keys:
            return simplest(Causal(), queries, keys)
        case Causal() if queries == 1:
            return Full()
        case BlockCausal(prefix_lengths=None, length=length) if length is None or length >= keys:
            if mask.end(first) >= keys:
                return Full()
            return Causal() if mask.block == 1 and mask.prefix <= 1 else BlockCausal(mask.block, mask.prefix)
    return mask


def pairs(mask: Mask, queries: int, keys: int) -> int:
    """How many pairs of a query and a key see each other, per sample and head. Ragged prefixes count in full."""
    first = keys - queries
    match simplest(mask, queries, keys):
        case Full():
            return queries * keys
        case Causal():
            return _staircase(first, keys, 1)
        case Window(size):
            return sum(min(size, i + 1) for i in range(first, keys))
        case BlockCausal(block, prefix, _, length):
            end = keys if length is None else min(length, keys)
            in_prefix = max(0, min(prefix, end) - first) * min(prefix, end)
            first = max(first, prefix)
            return in_prefix + max(0, end - first) * prefix + _staircase(first - prefix, end - prefix, block)


def _staircase(first: int, end: int, block: int) -> int:
    """Sum over i in first..end-1 of min(end, what a token of blocks sees)."""
    return sum(min(end, (i // block + 1) * block) for i in range(first, end))
