"""Block-causal attention as a few dense calls, exactly and without wasted work.

Fused kernels know dense and causal attention, and not the staircase of blocks. But softmax over a union of keys follows
from the softmax over each part and its log-sum-exp, so the staircase is cut into rectangles:

- forward, by rows: the queries of a block (or of a chunk of small blocks) on all keys before them, and on their own;
  parts of a row are merged by log-sum-exp;
- backward, by columns: the keys of a block with all queries from there on. With the output and the log-sum-exp of the
  *whole* row, each rectangle's gradients are its exact share, and are added up (as in ring attention, Liu et al. 2023,
  arXiv:2310.01889).

The kernels (``kernels.py``) give output and log-sum-exp of a piece, and its gradients from those of the whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from stpredict.attention.kernels import KERNELS
from stpredict.attention.masks import BlockCausal, pairs


@dataclass(frozen=True)
class Piece:
    """``rows`` of queries on ``keys``, all of them; or, with ``block``, as many ``tiles`` of a staircase along the
    diagonal, in which queries see their own block of the tile and earlier ones."""

    rows: slice
    keys: slice
    block: int = 0
    tiles: int = 1


def by_rows(n: int, block: int, prefix: int, chunk: int) -> Iterator[Piece]:
    """What a sequence of ``n`` tokens is cut into for the forward pass."""
    if prefix:
        yield Piece(slice(0, prefix), slice(0, prefix))
    if block >= chunk:
        for start in range(prefix, n, block):
            stop = min(start + block, n)
            yield Piece(slice(start, stop), slice(0, stop))
        return
    size = chunk // block * block
    yield from _staircases(n, block, prefix, size)
    for start in range(prefix if prefix else size, n, size):
        yield Piece(slice(start, min(start + size, n)), slice(0, start))


def by_columns(n: int, block: int, prefix: int, chunk: int) -> Iterator[Piece]:
    """The same pairs for the backward pass."""
    if prefix:
        yield Piece(slice(0, n), slice(0, prefix))
    if block >= chunk:
        for start in range(prefix, n, block):
            yield Piece(slice(start, n), slice(start, min(start + block, n)))
        return
    size = chunk // block * block
    yield from _staircases(n, block, prefix, size)
    for start in range(prefix, n - size, size):
        yield Piece(slice(start + size, n), slice(start, start + size))


def _staircases(n: int, block: int, prefix: int, size: int) -> Iterator[Piece]:
    tiles = (n - prefix) // size
    end = prefix + tiles * size
    if tiles:
        yield Piece(slice(prefix, end), slice(prefix, end), block, tiles)
    if end < n:
        yield Piece(slice(end, n), slice(end, n), block)


def block_causal(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausal, kernel: str) -> Tensor:
    """``q`` (b, heads, n, d), ``k`` and ``v`` (b, key heads, n, d), by the kernel of that name."""
    return _forward(q, k, v, mask.block, mask.prefix, kernel)[0]


# An operator of its own: FLOPs are counted by its exact share of the pairs, selective checkpointing keeps what it made,
# and torch.compile and tensors without memory take it as a whole.
@torch.library.custom_op("stpredict::block_causal_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, block: int, prefix: int, kernel: str) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of every row ``(b, heads, n)``."""
    by = KERNELS[kernel]
    out, lse = _outputs(q)
    for piece in by_rows(q.shape[2], block, prefix, by.chunk):
        of_piece = (_cut(q, piece.rows, piece), _cut(k, piece.keys, piece), _cut(v, piece.keys, piece))
        new = [_joined(x, piece) for x in by.forward(*of_piece, piece.block)]
        here = out[:, :, piece.rows], lse[:, :, piece.rows]
        if piece.keys.stop < piece.rows.stop:  # the rows' own blocks came before
            new = merged(*here, *new)
        for there, values in zip(here, new, strict=True):
            there.copy_(values)
    return out, lse


@torch.library.custom_op("stpredict::block_causal_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: int, prefix: int, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    by = KERNELS[kernel]
    # Sums of many rectangles: in fp32, unless it is all in fp64.
    sums = tuple(torch.zeros_like(_like(x), dtype=lse.dtype) for x in (q, k, v))
    for piece in by_columns(q.shape[2], block, prefix, by.chunk):
        rows = (_cut(x, piece.rows, piece) for x in (gradient, q, out, lse))
        of_gradient, of_q, of_out, of_lse = rows
        of_k, of_v = _cut(k, piece.keys, piece), _cut(v, piece.keys, piece)
        parts = by.backward(of_gradient, of_q, of_k, of_v, of_out, of_lse, piece.block)
        for total, part, where in zip(sums, parts, (piece.rows, piece.keys, piece.keys), strict=True):
            total[:, :, where] += _joined(part, piece)
    return tuple(total.to(q.dtype) for total in sums)


def merged(out: Tensor, lse: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of the keys as one."""
    both = torch.logaddexp(lse, lse_2)
    weights = ((x - both).exp()[..., None] for x in (lse, lse_2))
    return out * next(weights) + out_2 * next(weights), both


def _cut(x: Tensor, where: slice, piece: Piece) -> Tensor:
    """``(b, h, n, ...)`` there; tiles of a staircase become samples."""
    x = x[:, :, where]
    return x if piece.tiles == 1 else x.unflatten(2, (piece.tiles, -1)).transpose(1, 2).flatten(0, 1)


def _joined(x: Tensor, piece: Piece) -> Tensor:
    return x if piece.tiles == 1 else x.unflatten(0, (-1, piece.tiles)).transpose(1, 2).flatten(2, 3)


def _like(x: Tensor) -> Tensor:
    """Of the shape of ``x``, with heads beside each other in memory: as the layers before and after have them."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_forward.register_fake
def _(q, k, v, block, prefix, kernel):
    return _outputs(q)


@_backward.register_fake
def _(gradient, q, k, v, out, lse, block, prefix, kernel):
    return _like(q), _like(k), _like(v)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.block, ctx.prefix, ctx.kernel = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, gradient: Tensor, _):
    return *_backward(gradient, *ctx.saved_tensors, ctx.block, ctx.prefix, ctx.kernel), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.stpredict.block_causal_attention)
def _flops(q: tuple, k: tuple, v: tuple, block: int, prefix: int, *_, out_shape=None, **__) -> int:
    """Two products of 2 FLOPs per channel, of the pairs that see each other."""
    b, h, n, d = q
    return 4 * b * h * d * pairs(BlockCausal(block, prefix), n, n)


@register_flop_formula(torch.ops.stpredict.block_causal_attention_backward)
def _backward_flops(gradient: tuple, q: tuple, k: tuple, v: tuple, out: tuple, lse: tuple, *mask, out_shape=None, **__):
    """Four products: the gradients of probabilities, queries, keys and values. The scores, computed again, are none."""
    return 2 * _flops(q, k, v, *mask)
