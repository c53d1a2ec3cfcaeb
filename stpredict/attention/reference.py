"""Dense-mask attention in plain PyTorch: what every kernel is tested against, and nothing else uses."""

import torch
from torch import Tensor

from stpredict.attention.masks import BlockCausal, Causal, Full, Mask


def dense_mask(mask: Mask, n: int) -> Tensor:
    """Who sees whom as bool ``(n queries, n keys)``."""
    i = torch.arange(n)
    match mask:
        case Full():
            return torch.ones(n, n, dtype=torch.bool)
        case Causal():
            return i[:, None] >= i[None, :]
        case BlockCausal(block, prefix):
            number = torch.where(i < prefix, -1, (i - prefix) // block)
            return number[:, None] >= number[None, :]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """As :func:`stpredict.attention.attention.attention`, written out: softmax(q k^T / sqrt(d) + mask) v."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~dense_mask(mask, q.shape[2]).to(q.device), float("-inf")).softmax(-1) @ v
