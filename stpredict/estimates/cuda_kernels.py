"""What operators keep for the backward pass on CUDA, computed where there is none.

Shapes are followed through torch's operators of the CPU. Attention keeps the same there (its output and a number per
query and head). These do not: dropout, whose mask has the input's type on a CPU; RMSNorm, which is written out there;
and padding, which CPU autocast would do in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CudaKernels(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is F.pad:
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
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
