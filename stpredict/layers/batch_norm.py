"""Batch normalisation whose statistics are those of the whole batch, however many ranks share it.

torch's BatchNorm normalises by each rank's own part, so that the loss depends on the number of ranks, and its
SyncBatchNorm refuses the CPU.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from stpredict.layers.recomputing import recomputing


class BatchNorm(_BatchNorm):
    """``(b, c, *)`` → the same, in ``x``'s type; takes torch.nn.BatchNorm1d's, 2d's and 3d's arguments and weights.

    In training, every position of every sample on every rank counts once, so ranks may have batches of other sizes (or
    an empty one); all must call it equally often. The running statistics are then equal on all ranks. Statistics are
    computed and kept in fp32, whatever the model is cast to. Without a process group, or alone in one, it is torch's.
    In evaluation without running statistics each rank normalises by its own part, as torch's does.

    With several ranks it cannot be differentiated twice (RuntimeError), as R1 on a discriminator would.

    ValueError in training where the whole batch has one value per channel.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected (b, c, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        weight, bias = (p if p is None else p.to(_precise(x.dtype)) for p in (self.weight, self.bias))
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        keeping = self.training and self.track_running_stats and not recomputing()
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            momentum, running = 0.0, (self.running_mean, self.running_var)
            if keeping:
                momentum = self._momentum()
            elif self.running_mean is not None:
                # A second forward has to save as many tensors for backward as the first.
                running = tuple(tensor.clone() for tensor in running)
            return F.batch_norm(x, *running, weight, bias, True, momentum, self.eps)
        normalised, mean, variance, count = _Normalised.apply(x, weight, bias, self.eps)
        if keeping:
            momentum = self._momentum()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        return normalised

    def _momentum(self) -> float:
        """Counts this batch, and says how much of the running statistics it is."""
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)

    def _apply(self, fn, recurse: bool = True):
        """Running statistics stay in fp32: in bf16, what a step adds to them is mostly rounded away."""
        before = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class _Normalised(Function):
    """Normalised ``x``, and mean, (biased) variance and number of values per channel over all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        values = x.to(_precise(x.dtype))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance, count = _over_ranks(values, axes)
        # Asking the GPU costs a wait: only where it is possible.
        if x.numel() <= x.shape[1] and count <= 1:
            raise ValueError(f"expected more than 1 value per channel over all ranks in training, got {tuple(x.shape)}")
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.axes, ctx.has_bias = axes, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        out = (values - _per_channel(mean, x)) * _per_channel(scale if weight is None else scale * weight, x)
        if bias is not None:
            out += _per_channel(bias, x)
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradient.to(mean.dtype)
        normalised = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(scale, x)
        of_bias, of_weight = gradient.sum(ctx.axes), (gradient * normalised).sum(ctx.axes)
        # All ranks' losses depend on this rank's values through mean and variance. The gradients of weight and bias are
        # this rank's alone: whoever trains adds those up.
        sums = torch.stack([of_bias, of_weight])
        dist.all_reduce(sums)
        along, spread = (_per_channel(part, x) for part in sums / count)
        of_x = (gradient - along - normalised * spread) * _per_channel(scale if weight is None else scale * weight, x)
        return of_x.to(x.dtype), None if weight is None else of_weight, of_bias if ctx.has_bias else None, None


def _over_ranks(values: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of each channel over all ranks, from each rank's own (Chan, Golub & LeVeque
    1983): unlike sums of squares, exact where the mean is large beside the spread."""
    channels = values.shape[1]
    count = values.numel() // channels
    mean = values.sum(axes) / max(1, count)
    squares = (values - _per_channel(mean, values)).square().sum(axes)
    table = values.new_zeros(dist.get_world_size(), 2 * channels + 1)  # a row for each rank
    table[dist.get_rank()] = torch.cat([mean, squares, values.new_full((1,), count)])
    dist.all_reduce(table)
    means, squares, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    squares = squares.sum(0) + ((means - mean).square() * counts).sum(0)
    return mean, squares / total, total


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``(c,)`` as it broadcasts with ``x``."""
    return rearrange(values, f"c -> 1 c{' 1' * (x.ndim - 2)}")


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
