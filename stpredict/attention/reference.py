"""Dense-mask attention in plain PyTorch: what every kernel is tested against, and nothing else uses."""

import torch
from torch import Tensor

from stpredict.attention.masks import BlockCausal, Causal, Full, Mask, Window


def dense_mask(mask: Mask, queries: int, keys: int | None = None) -> Tensor:
    """Who sees whom as bool ``(queries, keys)``, or ``(b, 1, queries, keys)`` where the prefix is ragged."""
    keys = queries if keys is None else keys
    j = torch.arange(keys)
    i = j[keys - queries :]
    match mask:
        case Full():
            return torch.ones(queries, keys, dtype=torch.bool)
        case Causal():
            return i[:, None] >= j[None, :]
        case Window(size):
            return (i[:, None] >= j[None, :]) & (i[:, None] - j[None, :] < size)
        case BlockCausal(block, prefix, prefix_lengths, length):
            number = torch.where(j < prefix, -1, (j - prefix) // block)
            real = j < (keys if length is None else length)
            if prefix_lengths is not None:
                real = real & ((j >= prefix) | (j < prefix_lengths.cpu()[:, None]))[:, None]
            return (number[keys - queries :, None] >= number) & real[..., None, :] & real[..., keys - queries :, None]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """As :func:`stpredict.attention.attention.attention`, written out: softmax(q k^T / sqrt(d) + mask) v."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    allowed = dense_mask(mask, q.shape[2], k.shape[2]).to(q.device)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    something = allowed.any(-1, keepdim=True)
    return torch.where(something, scores, 0).softmax(-1).masked_fill(~something, 0) @ v
