"""Attention of a few queries or keys in matrix products: the corners that no fused kernel knows. As the kernels do, it
tells the log-sum-exp, and gives gradients from the output and log-sum-exp of whole rows. The scores are in memory at
once: ``above`` has a block's, ``ragged`` those of all queries on a prefix.

Shapes: ``above``: queries see the keys that come after them. ``ragged``: all queries see the first ``lengths`` ``(b)``
keys of their sample; a row that sees none has output 0 and log-sum-exp -inf.
"""

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, shape: str, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """``q`` (b, heads, n, d), ``k`` and ``v`` (b, key heads, m, d): the output, and log-sum-exps ``(b, heads, n)``."""
    scores = _scores(q, k, shape, lengths)
    lse = scores.logsumexp(-1)
    out = _probabilities(scores, lse) @ _grouped(v, v)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: str,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    grouped_q, grouped_k, grouped_v = (_grouped(x, k) for x in (q, k, v))
    gradient, out, lse = (_grouped(x, k) for x in (gradient, out, lse[..., None]))
    p = _probabilities(_scores(q, k, shape, lengths), lse.squeeze(-1))
    of_v = (p.transpose(-1, -2) @ gradient).sum(2)
    of_scores = p * (gradient @ grouped_v.transpose(-1, -2) - (gradient * out).sum(-1, keepdim=True))
    of_scores = of_scores * q.shape[-1] ** -0.5
    of_k = (of_scores.transpose(-1, -2) @ grouped_q).sum(2)
    return (of_scores @ grouped_k).flatten(1, 2), of_k, of_v


def _scores(q: Tensor, k: Tensor, shape: str, lengths: Tensor | None) -> Tensor:
    """``(b, key heads, heads of queries to each, n, m)``."""
    scores = _grouped(q, k) @ _grouped(k, k).transpose(-1, -2) * q.shape[-1] ** -0.5
    i, j = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    seen = i[:, None] < j if shape == "above" else (j < lengths.to(q.device)[:, None])[:, None, None, None]
    return scores.masked_fill(~seen, float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``(b, heads, ...)`` as ``(b, key heads, heads to each, ...)``, at least in fp32."""
    return x.unflatten(1, (k.shape[1], -1)).to(torch.promote_types(x.dtype, torch.float32))
