"""From logits to drawn tokens: temperature, top-k, top-p (nucleus), and drawing with given uniform numbers."""

import torch
from torch import Tensor

from stpredict.sampling.config import SamplingConfig


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Distribution ``(..., v)`` fp32 after temperature, then top-k, then top-p of ``logits`` ``(..., v)``.

    Top-p keeps the smallest set of likeliest tokens whose probability reaches p. Temperature 0 is one-hot.
    """
    logits = logits.float()
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probability = logits.softmax(-1)
    if config.top_p is not None and config.top_p < 1:
        ordered, index = probability.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= config.top_p, 0)
        probability = torch.zeros_like(probability).scatter(-1, index, kept)
        probability = probability / probability.sum(-1, keepdim=True)
    return probability


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Tokens ``(...)`` int64 from ``(..., v)``: where the cumulative sum passes ``uniform`` ``(...)`` in [0, 1)."""
    cumulative = probability.double().cumsum(-1)
    target = (uniform.double() * cumulative[..., -1])[..., None].contiguous()
    # right=True skips tokens of probability 0 that stand before the drawn one.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probability.shape[-1] - 1)
