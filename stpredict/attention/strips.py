"""Any mask by PyTorch's own attention, a strip of queries at a time: no mask tensor is higher than ``ROWS``.

Each strip is given the keys that one of its queries sees at all, and a mask only where not every one sees all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stpredict.attention.masks import BlockCausal, Causal, Full, Mask, Window

# Enough to keep a kernel busy, little enough that the keys which a row must not see cost little. Larger blocks have a
# strip each.
ROWS = 128


def strips(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """As :func:`stpredict.attention.attention.attention`, of sequences without padding at their end. What the padding
    of a prefix attends to is left open."""
    n, m = q.shape[2], k.shape[2]
    match mask:
        case Full():
            return _attend(q, k, v)
        case Causal() if n == m:
            return _attend(q, k, v, causal=True)
        case Causal():
            mask = Window(m)
    position = torch.arange(m, device=q.device)
    out, start = [], m - n
    while start < m:
        stop = min(_stop(mask, start), m)
        low = max(0, start + 1 - mask.size) if isinstance(mask, Window) else 0
        allowed = _allowed(mask, start, stop, position[low:stop])
        rows = slice(start - m + n, stop - m + n)
        out.append(_attend(q[:, :, rows], k[:, :, low:stop], v[:, :, low:stop], allowed))
        start = stop
    return torch.cat(out, dim=2)


def _stop(mask: Window | BlockCausal, start: int) -> int:
    """Where the strip ends that begins at ``start``: with a whole block."""
    if isinstance(mask, Window):
        return start + ROWS
    first = mask.end(start)
    if start < mask.prefix:
        return first
    return first + max(0, start + ROWS - first) // mask.block * mask.block


def _allowed(mask: Window | BlockCausal, start: int, stop: int, keys: Tensor) -> Tensor | None:
    """Which of ``keys`` the queries ``start..stop-1`` see: ``(queries, keys)``, or ``(b, 1, queries, keys)`` where the
    prefix is ragged, or None for all of them."""
    i = torch.arange(start, stop, device=keys.device)[:, None]
    if isinstance(mask, Window):
        return (i >= keys) & (i - keys < mask.size)
    allowed = None
    if mask.end(start) < keys.shape[0]:
        allowed = (i - mask.prefix) // mask.block >= (keys - mask.prefix) // mask.block
    if mask.prefix_lengths is not None:
        lengths = mask.prefix_lengths.to(keys.device)[:, None]
        real = (keys >= mask.prefix) | (keys < lengths)
        # What padding sees is nobody's business, but a kernel may make NaN of nothing.
        ragged = real[:, None, None] | ((i < mask.prefix) & (i >= lengths[..., None]))[:, None]
        allowed = ragged if allowed is None else allowed & ragged
    return allowed


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=grouped)
