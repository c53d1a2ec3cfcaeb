"""Block-causal attention as a few dense calls, exactly and without wasted work.

Fused kernels know dense and causal attention, and not the staircase of blocks. But softmax over a union of keys follows
from the softmax over each part and its log-sum-exp, so the staircase is cut into rectangles:

- forward, by rows: the queries of a block on all keys up to its end. Small blocks share a rectangle, and parts of a
  row are merged by log-sum-exp: a chunk of them on all keys before it, and the staircase in the chunk, for kernels that
  take a mask; else causal attention, and what is above its diagonal in each block, written out;
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

from stpredict.attention import written_out
from stpredict.attention.kernels import KERNELS, Kernel, Shape
from stpredict.attention.masks import BlockCausal, pairs

WRITTEN_OUT = ("above", "ragged")  # shapes that no kernel needs to know


@dataclass(frozen=True)
class Piece:
    """``rows`` of queries on ``keys``; or, on the diagonal, as many square ``tiles``, of which each attends to itself.

    ``block`` is the size of the blocks in a staircase. ``more``: by rows, these rows were in an earlier piece; by
    columns, these keys.
    """

    rows: slice
    keys: slice
    shape: Shape = "all"
    block: int = 0
    tiles: int = 1
    more: bool = False


def by_rows(n: int, mask: BlockCausal, kernel: Kernel) -> Iterator[Piece]:
    """What a sequence of ``n`` tokens is cut into for the forward pass."""
    prefix, ragged = mask.prefix, mask.prefix_lengths is not None
    if prefix and not ragged:
        yield Piece(slice(0, prefix), slice(0, prefix))
    first = prefix if ragged else 0  # the keys of a ragged prefix come at last
    if mask.block >= kernel.chunk:
        for start in range(prefix, n, mask.block):
            stop = min(start + mask.block, n)
            yield Piece(slice(start, stop), slice(first, stop))
    else:
        yield from _diagonal(n, mask, kernel)
        step = kernel.chunk // mask.block * mask.block if kernel.staircases else n
        for start in range(prefix, n, step):
            if start > first:
                yield Piece(slice(start, min(start + step, n)), slice(first, start), more=True)
    if ragged:
        yield Piece(slice(0, n), slice(0, prefix), "ragged", more=True)


def by_columns(n: int, mask: BlockCausal, kernel: Kernel) -> Iterator[Piece]:
    """The same pairs for the backward pass."""
    prefix = mask.prefix
    if prefix:
        yield Piece(slice(0, n), slice(0, prefix), "all" if mask.prefix_lengths is None else "ragged")
    if mask.block >= kernel.chunk:
        for start in range(prefix, n, mask.block):
            yield Piece(slice(start, n), slice(start, min(start + mask.block, n)))
        return
    yield from _diagonal(n, mask, kernel)
    if kernel.staircases:
        size = kernel.chunk // mask.block * mask.block
        for start in range(prefix, n - size, size):
            yield Piece(slice(start + size, n), slice(start, start + size), more=True)


def _diagonal(n: int, mask: BlockCausal, kernel: Kernel) -> Iterator[Piece]:
    """Small blocks: with others in the tiles of a staircase, or else as causal attention and what is above its diagonal
    in each block."""
    if n <= mask.prefix:
        return
    if kernel.staircases:
        yield from _tiled(n, mask.prefix, kernel.chunk // mask.block * mask.block, "staircase", mask.block)
        return
    yield Piece(slice(mask.prefix, n), slice(mask.prefix, n), "causal")
    if mask.block > 1:
        yield from _tiled(n, mask.prefix, mask.block, "above", more=True)


def _tiled(n: int, start: int, size: int, shape: Shape, block: int = 0, more: bool = False) -> Iterator[Piece]:
    tiles = (n - start) // size
    end = start + tiles * size
    if tiles:
        yield Piece(slice(start, end), slice(start, end), shape, block, tiles, more)
    if end < n:
        yield Piece(slice(end, n), slice(end, n), shape, block, more=more)


def block_causal(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausal, kernel: str) -> Tensor:
    """``q`` (b, heads, n, d), ``k`` and ``v`` (b, key heads, n, d), by the kernel of that name. Of sequences without
    padding at their end; the padding of a prefix attends to its tokens."""
    # Kernels take it unasked that the channels of a head lie beside each other.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _forward(q, k, v, mask.prefix_lengths, mask.block, mask.prefix, kernel)[0]


# An operator of its own: FLOPs are counted by its exact share of the pairs, selective checkpointing keeps what it made,
# and torch.compile and tensors without memory take it as a whole.
@torch.library.custom_op("stpredict::block_causal_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_lengths: Tensor | None, block: int, prefix: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of every row ``(b, heads, n)``."""
    by = KERNELS[kernel]
    out, lse = _outputs(q)
    if prefix_lengths is not None:
        out[:, :, :prefix], lse[:, :, :prefix] = 0, float("-inf")
    for piece in by_rows(q.shape[2], BlockCausal(block, prefix, prefix_lengths), by):
        of_piece = [_cut(x, where, piece) for x, where in ((q, piece.rows), (k, piece.keys), (v, piece.keys))]
        if piece.shape in WRITTEN_OUT:
            new = written_out.forward(*of_piece, piece.shape, prefix_lengths)
        else:
            new = by.forward(*of_piece, piece.shape, piece.block)
        new = [_joined(x, piece) for x in new]
        here = out[:, :, piece.rows], lse[:, :, piece.rows]
        for there, values in zip(here, merged(*here, *new) if piece.more else new, strict=True):
            there.copy_(values)
    return out, lse


@torch.library.custom_op("stpredict::block_causal_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block: int,
    prefix: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    by = KERNELS[kernel]
    # Sums of many rectangles: in fp32, unless it is all in fp64. Every row and every key is in a first piece.
    sums = [_like(x, lse.dtype) for x in (q, k, v)]
    seen = 0  # rows, up to this one, were in an earlier piece
    for piece in by_columns(q.shape[2], BlockCausal(block, prefix, prefix_lengths), by):
        places = (piece.rows, piece.keys, piece.keys)
        of_piece = [_cut(x, where, piece) for x, where in zip((q, k, v), places, strict=True)]
        of_rows = [_cut(x, piece.rows, piece) for x in (gradient, out, lse)]
        if piece.shape in WRITTEN_OUT:
            parts = written_out.backward(*of_piece, *of_rows, piece.shape, prefix_lengths)
        else:
            parts = by.backward(*of_piece, *of_rows, piece.shape, piece.block)
        more = piece.rows.start < seen, piece.more, piece.more
        for i, (part, where, add) in enumerate(zip(parts, places, more, strict=True)):
            part = _joined(part, piece)
            total = sums[i]
            # A part of everything is the sum, if it lies in memory as compiled code was told.
            if not add and part.shape == total.shape and (part.dtype, part.stride()) == (total.dtype, total.stride()):
                sums[i] = part
            else:
                here = total[:, :, where]
                here.add_(part) if add else here.copy_(part)
        seen = max(seen, piece.rows.stop)
    return tuple(total.to(q.dtype) for total in sums)


def merged(out: Tensor, lse: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of the keys as one."""
    both = torch.logaddexp(lse, lse_2)
    finite = both.masked_fill(both == float("-inf"), 0)  # a row that has seen nothing yet
    weight, weight_2 = ((x - finite).exp()[..., None] for x in (lse, lse_2))
    return out * weight + out_2 * weight_2, both


def _cut(x: Tensor, where: slice, piece: Piece) -> Tensor:
    """``(b, h, n, ...)`` there; tiles of a staircase become samples."""
    x = x[:, :, where]
    return x if piece.tiles == 1 else x.unflatten(2, (piece.tiles, -1)).transpose(1, 2).flatten(0, 1)


def _joined(x: Tensor, piece: Piece) -> Tensor:
    return x if piece.tiles == 1 else x.unflatten(0, (-1, piece.tiles)).transpose(1, 2).flatten(2, 3)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of the shape of ``x``, with heads beside each other in memory: as the layers before and after have them."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d, dtype=dtype).transpose(1, 2)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_forward.register_fake
def _(q, k, v, prefix_lengths, block, prefix, kernel):
    return _outputs(q)


@_backward.register_fake
def _(gradient, q, k, v, prefix_lengths, out, lse, block, prefix, kernel):
    return _like(q), _like(k), _like(v)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.block, ctx.prefix, ctx.kernel = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, gradient: Tensor, _):
    return *_backward(gradient, *ctx.saved_tensors, ctx.block, ctx.prefix, ctx.kernel), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.stpredict.block_causal_attention)
def _flops(q: tuple, k: tuple, v: tuple, prefix_lengths: tuple | None, block: int, prefix: int, *_, **__) -> int:
    """Two products of 2 FLOPs per channel, of the pairs that see each other; the prefix counts in full."""
    b, h, n, d = q
    return 4 * b * h * d * pairs(BlockCausal(block, prefix), n, n)


@register_flop_formula(torch.ops.stpredict.block_causal_attention_backward)
def _backward_flops(gradient: tuple, q: tuple, k: tuple, v: tuple, lengths: tuple | None, out, lse, *mask, **__) -> int:
    """Four products: the gradients of probabilities, queries, keys and values. The scores, computed again, are none."""
    return 2 * _flops(q, k, v, lengths, *mask)
