"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, a residual branch is left out at random."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """``(b, ...)`` → the same: in training a sample is 0 with probability ``rate`` and divided by 1 - rate otherwise.

    So its expectation stays. In evaluation, and at rate 0, it is ``x`` itself. It never waits for the GPU.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a branch is left out with a probability of at least 0 and less than 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.dropping:
            return x
        kept = torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)

    @property
    def dropping(self) -> bool:
        return self.training and self.rate > 0

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
