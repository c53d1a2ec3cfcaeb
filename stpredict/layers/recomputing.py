"""Whether a forward is the second one of the same step, which activation checkpointing runs to save memory. What a
layer counts or averages over the steps must not count it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_recomputing = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    return _recomputing.get()


@contextmanager
def recomputation() -> Iterator[None]:
    """Around the second forward: ``torch.utils.checkpoint.checkpoint(..., context_fn=lambda: (nullcontext(),
    recomputation()))``."""
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)
