"""From logits to drawn tokens: temperature, then top-k, then top-p (nucleus), then drawing with given uniform numbers.

:func:`probabilities` defines the filtered distribution, :func:`draw_tokens` draws from it by whatever is fastest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.rejection import draw_by_rejection

#: Uniform numbers for each token: as many tries but one, each of which succeeds at top-p 0.9 nine times of ten.
TRIES = 6


def uniform_numbers(seeds: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """Float64 ``(len(seeds), tokens, TRIES)`` in [0, 1): a sample's own, whatever batch it is in."""
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(tokens, TRIES, dtype=torch.float64, generator=g) for g in generators]).to(device)


def draw_tokens(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """Tokens int64 ``(...)`` from ``probabilities(logits, config)``, with the numbers ``uniform`` ``(..., TRIES)``.

    A row's token depends on nothing but the row and its numbers. On CUDA there is no synchronisation and every shape is
    static, so that the call can be part of a graph; on a CPU, where sorting is slow, tokens are tried and rejected.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    if logits.device.type != "cpu":
        return draw(probabilities(logits, config), uniform[..., 0])
    rows, uniform = _tempered(logits, config).flatten(0, -2), uniform.flatten(0, -2)
    token, left = draw_by_rejection(rows, *_limits(rows, config), uniform[:, :-1])
    if left.any():
        token[left] = draw(_filtered(rows[left], config), uniform[left, -1])
    return token.view(logits.shape[:-1])


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Distribution ``(..., v)`` fp32 after temperature, then top-k, then top-p of ``logits`` ``(..., v)``.

    Top-p keeps the smallest set of likeliest tokens whose share of what top-k left reaches p. Both keep all tokens that
    are as likely as the least likely one they must keep. Temperature 0 is one-hot.
    """
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return _filtered(_tempered(logits, config), config)


def _filtered(logits: Tensor, config: SamplingConfig) -> Tensor:
    """``probabilities`` of logits that were divided by the temperature."""
    top_k, top_p = _limits(logits, config)
    if top_k < logits.shape[-1] or top_p < 1:
        likeliest = logits.topk(top_k, dim=-1).values
        logits = logits.masked_fill(logits < likeliest[..., -1:], float("-inf"))
        share = (likeliest.double() - logits.double().logsumexp(-1, keepdim=True)).exp()
        before = share.cumsum(-1) - share
        least = likeliest.masked_fill(before >= top_p, float("inf")).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits.softmax(-1)


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Tokens ``(...)`` int64 from ``(..., v)``: where the cumulative sum passes ``uniform`` ``(...)`` in [0, 1)."""
    cumulative = probability.double().cumsum(-1)
    target = (uniform.double() * cumulative[..., -1])[..., None].contiguous()
    # right=True skips tokens of probability 0 that stand before the drawn one.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probability.shape[-1] - 1)


def _tempered(logits: Tensor, config: SamplingConfig) -> Tensor:
    return logits.float() if config.temperature == 1 else logits.float() / config.temperature


def _limits(logits: Tensor, config: SamplingConfig) -> tuple[int, float]:
    """Top-k and top-p, where absent those that leave everything."""
    return min(config.top_k or logits.shape[-1], logits.shape[-1]), config.top_p or 1.0
