"""Attention by mask description, over PyTorch's fused kernels. A mask tensor is at most ``CHUNK`` rows high."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stpredict.attention.masks import BlockCausal, Causal, Full, Mask

# Rows of queries per kernel call: enough to keep the kernel busy, little enough that the keys which a
# row must not see (at most a chunk's length) cost little. Smaller blocks share a call, larger ones have their own.
CHUNK = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention. ``q`` (b, heads, n, d), ``k`` and ``v`` (b, heads, m, d); returns (b, heads, n, d).

    Causal masks need n = m; the sequence of ``BlockCausal`` may end with part of a block.
    """
    match mask:
        case Full():
            return F.scaled_dot_product_attention(q, k, v)
        case Causal():
            _same_length(q, k)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        case BlockCausal(block=1, prefix=0):
            return attention(q, k, v, Causal())
        case BlockCausal():
            _same_length(q, k)
            return _block_causal(q, k, v, mask)


def _block_causal(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausal) -> Tensor:
    """One call per chunk of whole blocks on the keys up to the chunk's end."""
    n, prefix = q.shape[2], mask.prefix
    out = [F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix])] if prefix else []
    chunk = mask.block * max(1, CHUNK // mask.block)
    for start in range(prefix, n, chunk):
        end = min(start + chunk, n)
        allowed = None
        if end - start > mask.block:
            blocks = torch.arange(start - prefix, end - prefix, device=q.device) // mask.block
            earlier = torch.ones(end - start, start, dtype=torch.bool, device=q.device)
            allowed = torch.cat([earlier, blocks[:, None] >= blocks[None, :]], dim=1)
        keys, values = k[:, :, :end], v[:, :, :end]
        out.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values, attn_mask=allowed))
    return torch.cat(out, dim=2)


def _same_length(q: Tensor, k: Tensor) -> None:
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"causal masks need as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
