"""Attention by FlexAttention: one kernel compiled for each shape, which skips the tiles that nobody sees.

Which tiles those are follows from a mask's two ends of what a token sees, both of which only grow along the sequence:
no mask is ever evaluated at every pair.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from stpredict.attention.masks import BlockCausal, Causal, Full, Mask, Window

TILE = 128
# Shapes are compiled one by one; past so many, torch says so rather than attend without a compiled kernel.
SHAPES = 64


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """As :func:`stpredict.attention.attention.attention`; what the padding of a prefix attends to is left open."""
    tiles = None if isinstance(mask, Full) else block_mask(mask, q.shape[2], k.shape[2], q.device)
    if not torch.is_grad_enabled():  # for CPUs torch refuses what requires a gradient, also where none will be taken
        q, k, v = (x.detach() for x in (q, k, v))
    return _compiled()(q, k, v, block_mask=tiles, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, recompile_limit=SHAPES)


def block_mask(mask: Mask, n: int, m: int, device: torch.device) -> BlockMask:
    """Of ``n`` queries, the last of ``m`` tokens. Made once for each shape, and for each tensor of prefix lengths."""
    if isinstance(mask, BlockCausal) and mask.prefix_lengths is not None:
        return _ragged(mask, n, m, device)
    return _made(mask, n, m, device)


@lru_cache(maxsize=SHAPES)
def _made(mask: Mask, n: int, m: int, device: torch.device) -> BlockMask:
    return _from_tiles(mask, n, m, device)


# The layers of a model ask for the same one after another.
_last: list = []


def _ragged(mask: BlockCausal, n: int, m: int, device: torch.device) -> BlockMask:
    key = (mask.block, mask.prefix, n, m, device)
    if not _last or _last[0] is not mask.prefix_lengths or _last[1] != key:
        _last[:] = [mask.prefix_lengths, key, _from_tiles(mask, n, m, device)]
    return _last[2]


def _from_tiles(mask: Mask, n: int, m: int, device: torch.device) -> BlockMask:
    partial, full = tiles(mask, n, m)
    lists = [x for seen in (partial, full) for x in _lists(seen.to(device))]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=_seen(mask, m - n, device), seq_lengths=(n, m))


def tiles(mask: Mask, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Which tiles of queries ``(ceil(n / TILE))`` see tiles of keys ``(ceil(m / TILE))`` in part, and which in full."""
    first = torch.arange(0, n, TILE)
    last = (first + TILE).clamp(max=n) - 1
    low, high = _ends(mask, first + m - n, m), _ends(mask, last + m - n, m)
    start = torch.arange(0, m, TILE)
    stop = start + TILE
    some = (start < high[1][:, None]) & (stop > low[0][:, None])
    # A tile that reaches beyond the sequence, or into a ragged prefix, is left to the mask.
    whole = (start >= high[0][:, None]) & (stop <= low[1][:, None]) & (first + TILE <= n)[:, None]
    if isinstance(mask, BlockCausal) and mask.prefix_lengths is not None:
        whole &= start >= mask.prefix
    return some & ~whole, some & whole


def _ends(mask: Mask, i: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The first key that the tokens ``i`` see, and the one after the last."""
    match mask:
        case Causal():
            return torch.zeros_like(i), i + 1
        case Window(size):
            return (i + 1 - size).clamp(min=0), i + 1
        case BlockCausal():
            return torch.zeros_like(i), torch.tensor([min(mask.end(token), m) for token in i.tolist()])


def _lists(seen: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries sees, and which, those first."""
    order = torch.argsort(seen.int(), dim=1, descending=True, stable=True)
    return seen.sum(1).int()[None, None], order.int()[None, None]


def _seen(mask: Mask, offset: int, device: torch.device) -> Callable[..., Tensor]:
    match mask:
        case Causal():
            return lambda b, h, q, kv: q + offset >= kv
        case Window(size):
            return lambda b, h, q, kv: (q + offset >= kv) & (q + offset - kv < size)
        case BlockCausal(block, prefix, lengths):
            pass

    def earlier(b, h, q, kv):
        blocks = [torch.where(x < prefix, -1, (x - prefix) // block) for x in (q + offset, kv)]
        return blocks[0] >= blocks[1]

    if lengths is None:
        return earlier
    lengths = lengths.to(device)
    # The padding of a prefix sees its own kind, lest it see nothing.
    return lambda b, h, q, kv: (
        earlier(b, h, q, kv)
        & ((kv >= prefix) | (kv < lengths[b]) | ((q + offset < prefix) & (q + offset >= lengths[b])))
    )
