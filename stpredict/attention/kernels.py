"""Kernels that attend to a piece of the keys and tell the log-sum-exp too, and that give a piece's gradients from the
output and log-sum-exp of the whole rows. Shapes: ``(b, heads, n, d)``; log-sum-exps ``(b, heads, n)``."""

from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten

# Which keys of a piece its queries see: all; those up to themselves; those of their own block and earlier ones; those
# after themselves; the first of a sample's own number.
Shape = Literal["all", "causal", "staircase", "above", "ragged"]


class Kernel(Protocol):
    #: Rows of queries that are worth a call: blocks as large have one each, smaller ones share it.
    chunk: int
    #: Whether it takes the shape ``staircase``.
    staircases: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, block: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the shapes ``all``, ``causal`` and, with the size of its blocks, ``staircase``."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, out: Tensor, lse: Tensor, shape: Shape, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``v``."""


class TorchCpu:
    """PyTorch's flash attention for CPUs; it takes a mask, of which one small one serves all staircases."""

    chunk, staircases = 256, True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, block: int) -> tuple[Tensor, Tensor]:
        k, v = _repeated(q, k, v)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, shape == "causal", attn_mask=_staircase(q, block)
        )

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, out: Tensor, lse: Tensor, shape: Shape, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = k.shape[1]
        k, v = _repeated(q, k, v)
        of_q, *others = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, shape == "causal", attn_mask=_staircase(q, block)
        )
        return of_q, *(x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2) for x in others)


class TorchCuda:
    """The flash attention that is in PyTorch: on CUDA, in half precision."""

    chunk, staircases = 128, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, block: int) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, shape == "causal")
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, out: Tensor, lse: Tensor, shape: Shape, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)  # its random state: there is none
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out=gradient,
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=lse.contiguous(),
            cum_seq_q=None,
            cum_seq_k=None,
            max_q=q.shape[2],
            max_k=k.shape[2],
            dropout_p=0.0,
            is_causal=shape == "causal",
            philox_seed=of_dropout,
            philox_offset=of_dropout,
        )


class FlashAttention:
    """The package flash-attn, 2.7 or newer, whose tensors are ``(b, n, heads, d)``."""

    chunk, staircases = 128, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, block: int) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _flash_attn()._flash_attn_forward(
            *(x.transpose(1, 2) for x in (q, k, v)),
            return_softmax=False,
            **_options(q, shape),
        )
        return out.transpose(1, 2), lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, out: Tensor, lse: Tensor, shape: Shape, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, gradient, out = (x.transpose(1, 2) for x in (q, k, v, gradient, out))
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        _flash_attn()._flash_attn_backward(
            gradient,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            *gradients,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=None,
            **_options(q, shape),
        )
        return tuple(x.transpose(1, 2) for x in gradients)


def _flash_attn():
    from flash_attn import flash_attn_interface

    return flash_attn_interface


def _options(q: Tensor, shape: Shape) -> dict:
    return {
        "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": shape == "causal",
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _repeated(q: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
    """A head for every head of the queries."""
    times = q.shape[1] // keys_and_values[0].shape[1]
    return [x if times == 1 else x.repeat_interleave(times, 1) for x in keys_and_values]


def _staircase(q: Tensor, block: int) -> Tensor | None:
    return _additive(q.shape[2], block, q.dtype) if block else None


@lru_cache(maxsize=64)
def _additive(n: int, block: int, dtype: torch.dtype) -> Tensor:
    number = torch.arange(n) // block
    return torch.zeros(n, n, dtype=dtype).masked_fill(number[:, None] < number, float("-inf"))


KERNELS: dict[str, Kernel] = {"torch_cpu": TorchCpu(), "torch_cuda": TorchCuda(), "flash_attn": FlashAttention()}
