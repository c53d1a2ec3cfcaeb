"""TAU's differential divergence regularization (Tan et al. 2023, arXiv:2206.12126, section 3.4)."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def differential_divergence(prediction: Tensor, truth: Tensor, temperature: float) -> Tensor:
    """KL divergence of the truth's softmax of frame differences from the prediction's, of each step between two frames:
    ``(b, c, t, h, w)`` each to fp32 ``(b, t - 1)``.

    The softmax goes over channels and pixels. It is divided by their number, as the published code does by its mean
    over everything; hence the published weight, 0.1. A single step
    counts, too; the published code leaves it out.
    """
    predicted, true = (
        F.log_softmax(rearrange(x.float().diff(dim=2), "b c t h w -> b t (c h w)") / temperature, dim=-1)
        for x in (prediction, truth)
    )
    return (predicted.exp() * (predicted - true)).mean(dim=-1)
