"""Descriptions of who attends to whom. A mask is never a dense tensor outside the reference.

Sizes count tokens in sequence order.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    """Every query sees every key: within a block while decoding, and in encoders."""


@dataclass(frozen=True)
class Causal:
    """Query i sees keys 0..i: block size 1."""


@dataclass(frozen=True)
class BlockCausal:
    """Every token sees its whole block and all earlier ones; a bidirectional ``prefix`` is seen by all.

    The sequence is ``prefix`` tokens, then blocks of ``block`` tokens. The prefix sees only itself.
    """

    block: int
    prefix: int = 0


Mask = Full | Causal | BlockCausal
