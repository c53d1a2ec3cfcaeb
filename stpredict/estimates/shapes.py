"""A task that computes shapes alone: tensors that have sizes and types, and no memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stpredict.training.task import Task


class TaskOfShapes:
    """``task`` is a copy of a task whose modules have no memory, and the parameters of whose model are of ``dtype``.
    ``entered`` is where it can be used."""

    def __init__(self, task: Task, dtype: torch.dtype):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        shapes: dict[int, Any] = {}
        with self.mode:
            for module in modules(task):
                for buffer in module.buffers():
                    shapes[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                for parameter in module.parameters():
                    kind = dtype if module is task.model else parameter.dtype
                    empty = torch.empty(parameter.shape, dtype=kind, device="cpu")
                    shapes[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        self.task = copy.deepcopy(task, shapes)
        for module in modules(self.task):
            module.train()

    @contextmanager
    def entered(self) -> Iterator[None]:
        # All is on one device, and torch does not always move what has no memory.
        stay = patch.object(nn.Module, "to", lambda module, device: module)
        with self.mode, stay, patch.object(torch, "bincount", _bincount):
            yield


def modules(task: Task) -> list[nn.Module]:
    """All that a task computes with in training."""
    return [task.model, *([task.discriminator] if task.discriminator is not None else []), *task.networks()]


def _bincount(values: torch.Tensor, weights: None = None, minlength: int = 0) -> torch.Tensor:
    """torch.bincount of values that are all below ``minlength``, as codes are: its shape depends on no value."""
    return values.new_empty(minlength)
