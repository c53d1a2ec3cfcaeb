"""Attention whose rows each see the keys up to a limit of their own, where no mask description says it.

Sequences that are not made of blocks of one size need it, and decoding after prefixes of several lengths.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stpredict.attention.attention import attention
from stpredict.attention.masks import Full

ROWS = 128  # queries to a kernel call: a mask tensor is at most so high


def staircase_attention(
    q: Tensor, k: Tensor, v: Tensor, limits: Sequence[int], prefix: int = 0, prefix_lengths: Tensor | None = None
) -> Tensor:
    """Softmax attention where query i sees keys ``0 .. limits[i] - 1``; returns ``(b, heads, n, d)``.

    ``q`` (b, heads, n, d), ``k`` and ``v`` (b, heads, m, d); ``limits`` do not fall and are 1 to m. Of the first
    ``prefix`` keys, a sample sees only as many as ``prefix_lengths`` (b,) says, at least one.
    """
    out = []
    for start, end in _calls(limits):
        most = limits[end - 1]
        allowed = None
        if limits[start] != most:
            allowed = torch.arange(most, device=q.device) < torch.tensor(limits[start:end], device=q.device)[:, None]
        if prefix_lengths is not None:
            key = torch.arange(most, device=q.device)
            real = ((key >= prefix) | (key < prefix_lengths[:, None]))[:, None, None]
            allowed = real if allowed is None else allowed & real
        rows, keys, values = q[:, :, start:end], k[:, :, :most], v[:, :, :most]
        if allowed is None:
            out.append(attention(rows, keys, values, Full()))
        else:
            out.append(F.scaled_dot_product_attention(rows, keys, values, allowed))
    return torch.cat(out, dim=2)


def _calls(limits: Sequence[int]) -> list[tuple[int, int]]:
    """Rows that go together: all of one limit, or, where fewer have the same, ``ROWS`` at most."""
    changes = [i for i in range(1, len(limits)) if limits[i] != limits[i - 1]]
    runs = list(zip([0, *changes], [*changes, len(limits)], strict=True))
    calls = [runs[0]]
    for start, end in runs[1:]:
        if end - calls[-1][0] <= ROWS:
            calls[-1] = calls[-1][0], end
        else:
            calls.append((start, end))
    return calls
