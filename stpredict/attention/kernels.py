"""Kernels that attend to a piece of the keys and tell the log-sum-exp too, and that give a piece's gradients from the
output and log-sum-exp of the whole rows. Shapes: ``(b, heads, n, d)``; log-sum-exps ``(b, heads, n)``."""

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten


class Kernel(Protocol):
    #: Rows of queries that are worth a call: blocks as large have one each, smaller ones share it.
    chunk: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp. ``block`` 0: every query sees every key; otherwise as many queries as keys see their
        own block and earlier ones."""

    def backward(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``v``."""


class TorchCpu:
    """PyTorch's flash attention for CPUs; it takes a mask, of which one small one serves all staircases."""

    chunk = 256

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
        k, v = _repeated(q, k, v)
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_staircase(q, block))

    def backward(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = k.shape[1]
        k, v = _repeated(q, k, v)
        of_q, *others = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, False, attn_mask=_staircase(q, block)
        )
        return of_q, *(x.unflatten(1, (heads, -1)).sum(2) if x.shape[1] != heads else x for x in others)


def _repeated(q: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
    """A head for every head of the queries."""
    return [
        x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in keys_and_values
    ]


def _staircase(q: Tensor, block: int) -> Tensor | None:
    return _additive(q.shape[2], block, q.dtype) if block else None


@lru_cache(maxsize=64)
def _additive(n: int, block: int, dtype: torch.dtype) -> Tensor:
    number = torch.arange(n) // block
    return torch.zeros(n, n, dtype=dtype).masked_fill(number[:, None] < number, float("-inf"))


KERNELS: dict[str, Kernel] = {"cpu": TorchCpu()}
