"""What operators keep for the backward pass on CUDA, computed where there is none.

Shapes are followed through torch's operators of the CPU. Attention keeps the same there (its output and a number per
query and head). These do not: dropout, whose mask has the input's type on a CPU; RMSNorm, which is written out there;
and whatever autocast has compute in another type (``cuda_autocast``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from stpredict.estimates.cuda_autocast import cuda_autocast


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Meanwhile torch's functions are replaced, in the whole process: recomputation comes from inside autograd, where
    modes of torch are off."""
    with cuda_autocast(), patch.multiple(F, dropout=_dropout, rms_norm=_rms_norm):
        yield


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):  # which a function of autograd's does not see
        x, weight = x.float(), weight if weight is None else weight.float()
    if weight is None or weight.dtype != x.dtype:
        return torch.rms_norm(x, shape, weight, eps)
    return _FusedRmsNorm.apply(x, weight)


class _FusedRmsNorm(torch.autograd.Function):
    """Shapes and types alone: it keeps its input, and a number in fp32 per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
