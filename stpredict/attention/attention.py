"""Attention by mask description: one call, several backends."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stpredict.attention.masks import BlockCausal, Mask, simplest
from stpredict.attention.rectangles import block_causal
from stpredict.attention.strips import strips


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention. ``q`` (b, heads, n, d), ``k`` and ``v`` (b, key heads, m, d); returns (b, heads, n, d).

    Queries are the last n tokens of the m. ``heads`` is a multiple of ``key heads``, each of which serves as many heads
    of queries that follow each other (grouped-query attention). ValueError for shapes that do not fit.
    """
    n, m = q.shape[2], k.shape[2]
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    mask = simplest(mask, n, m)
    if not isinstance(mask, BlockCausal):
        return _by_backend(q, k, v, mask)
    if mask.length is not None and mask.length < m:
        real, end = max(0, n - (m - mask.length)), mask.length
        shorter = BlockCausal(mask.block, mask.prefix, mask.prefix_lengths)
        out = attention(q[:, :, :real], k[:, :, :end], v[:, :, :end], shorter) if real else q[:, :, :0]
        return F.pad(out, (0, 0, 0, n - real))
    out = _by_backend(q, k, v, mask)
    return out if mask.prefix_lengths is None else _without_padding(out, mask, m)


def _without_padding(out: Tensor, mask: BlockCausal, m: int) -> Tensor:
    """0 for the padding of the prefixes, and for what of them attends to nothing."""
    i = torch.arange(m - out.shape[2], m, device=out.device)
    padding = (i < mask.prefix) & (i >= mask.prefix_lengths.to(out.device)[:, None])
    return out.masked_fill(padding[:, None, :, None], 0)


def _by_backend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    whole = isinstance(mask, BlockCausal) and mask.prefix_lengths is None and q.shape[2] == k.shape[2]
    if whole and q.device.type in ("cpu", "meta"):
        if torch.is_autocast_enabled("cpu"):  # as it does with PyTorch's own attention
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        return block_causal(q, k, v, mask, "cpu")
    return strips(q, k, v, mask)
