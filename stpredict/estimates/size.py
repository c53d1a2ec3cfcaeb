"""Parameters and FLOPs of a planned training: exact, from shapes alone."""

from dataclasses import dataclass
from typing import Any

import torch

from stpredict.estimates.planned import Planned
from stpredict.training.flops import FORWARDS_PER_STEP, ShapesOnly, count_flops


@dataclass(frozen=True)
class Size:
    """``flops_forward``, ``macs_forward`` and ``tokens`` are one sample's. FLOPs are those that are computed, a
    multiply-add counting as two; multiply-adds are counted as papers on such models do
    (stpredict/forecasters/published_macs.py), to be held against theirs.

    Backward, every product is made twice: for the gradient of its input, and of its weight. Nobody asks for that of
    the first layer's input where it is data, which is counted all the same, as the engine counts it for its MFU: 0.1 %
    of the published tokenizer's.
    """

    parameters: int
    embedding_parameters: int
    tokens: int
    flops_forward: float
    macs_forward: float

    @property
    def flops_backward(self) -> float:
        return (FORWARDS_PER_STEP - 1) * self.flops_forward


def size_of(planned: Planned) -> Size:
    task = planned.task
    tables = [table.weight for table in task.model.modules() if isinstance(table, torch.nn.Embedding)]
    flops = _flops_of_forward(planned)
    return Size(
        parameters=sum(p.numel() for p in task.model.parameters()),
        embedding_parameters=sum(p.numel() for p in tables),
        tokens=task.tokens(planned.batch(1)),
        flops_forward=flops,
        macs_forward=task.published_macs(flops / 2),
    )


class _Called(Exception):  # noqa: N818 - no error: the end of what is wanted
    """Carries the arguments of the model's call."""


def _flops_of_forward(planned: Planned) -> float:
    """Of what the model is called with in a training step of one sample."""
    args, kwargs = _arguments(planned)
    flops = planned.task.forward_flops(*args, **kwargs)
    return count_flops(ShapesOnly(planned.task.model), args, kwargs) if flops is None else flops


def _arguments(planned: Planned) -> tuple[tuple, dict[str, Any]]:
    def forward(*args, **kwargs):
        raise _Called(args, kwargs)

    try:
        planned.task.training_step(forward, planned.batch(1))
    except _Called as called:
        return called.args
    raise ValueError("a training step calls its model")
