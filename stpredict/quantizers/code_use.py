"""How a codebook is used, from how often each code was."""

import torch
from torch import Tensor


def perplexity(uses: Tensor) -> float:
    """exp of the entropy of the codes' shares: ``uses`` (codes,) alike gives their number, a single one used 1."""
    share = uses.double() / uses.sum()
    return float((-torch.xlogy(share, share).sum()).exp())


def share_used(uses: Tensor) -> float:
    """The share of the codes that were used at all."""
    return float((uses > 0).double().mean())
