"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, residual branches are left out at random, each
sample's by themselves.

Models do not draw: what is left out comes with the batch, a function of the sample, and not of which rank has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept(rates: Sequence[float], chances: Tensor) -> Tensor:
    """By what branches are multiplied, fp32 ``(..., branches)``: 0 with a branch's probability among ``rates``, and
    1 / (1 - rate) otherwise, so that the expectation stays. ``chances``: as many numbers, even in [0, 1).

    ValueError for a rate that is no probability below 1.
    """
    if wrong := [rate for rate in rates if not 0 <= rate < 1]:
        raise ValueError(f"a branch is left out with a probability of at least 0 and less than 1, got {wrong[0]}")
    rate = torch.tensor(rates)
    return (chances >= rate) / (1 - rate)
