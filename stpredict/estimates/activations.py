"""What a micro-batch's forward and backward pass keep in memory, operator by operator, from shapes alone.

The task's own training step is run on tensors that have shapes and no memory, with the activation checkpointing that
the learner would apply.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stpredict.estimates.cuda_kernels import cuda_kernels
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.estimates.planned import Planned
from stpredict.training.activation_checkpointing import recompute
from stpredict.training.computing import ActivationCheckpointingConfig
from stpredict.training.task import Batch, Task, weighted

# Two sizes of micro-batch tell what grows with it. Not one sample: axes of one element take other ways through torch.
MEASURED = (2, 3)


@dataclass(frozen=True)
class Numbers:
    """In what a model computes: the type of its ``weights``, and that of autocast, if it is used."""

    weights: torch.dtype
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Activations:
    """At each moment of a forward and backward pass: bytes of what it has made that are alive, ``fixed`` +
    ``per_sample`` x micro-batch, finished gradients not among them; and the elements of parameters whose gradients
    are ``finished``."""

    fixed: np.ndarray
    per_sample: np.ndarray
    finished: np.ndarray

    def bytes(self, micro_batch: int) -> np.ndarray:
        return self.fixed + micro_batch * self.per_sample


def follow(
    planned: Planned, checkpointing: ActivationCheckpointingConfig, numbers: Numbers, device: str
) -> Activations:
    """``device``: cuda or cpu, whose kernels keep different things."""
    (few, finished), (more, _) = (
        _moments(planned, checkpointing, numbers, device, micro_batch) for micro_batch in MEASURED
    )
    per_sample = (more - few) / (MEASURED[1] - MEASURED[0])
    return Activations(few - MEASURED[0] * per_sample, per_sample, finished)


def _moments(
    planned: Planned,
    checkpointing: ActivationCheckpointingConfig,
    numbers: Numbers,
    device: str,
    micro_batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    task = _with_shapes(planned.task, numbers.weights, mode)
    recompute(task.layers(), checkpointing)
    alive: list[int] = []
    finished: list[int] = []
    done = 0

    def note() -> None:
        alive.append(live.bytes)
        finished.append(done)

    def finish(parameter: nn.Parameter) -> None:
        nonlocal done
        done += parameter.numel()
        parameter.grad = None

    for parameter in task.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(finish)
    for module in beside(task):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget)
    live = LiveBytes(note)
    for module in (task.model, *beside(task)):
        live.ignore((*module.parameters(), *module.buffers()))
    with ExitStack() as stack:
        for context in (
            mode,
            patch.object(torch, "bincount", _bincount),
            cuda_kernels() if device == "cuda" else nullcontext(),
            live,
        ):
            stack.enter_context(context)
        batch = planned.batch(micro_batch, device="cpu")
        _learn(task, _forward(task.model, numbers), batch)
    note()
    return np.array(alive, dtype=np.float64), np.array(finished, dtype=np.float64)


def _learn(task: Task, forward: Callable[..., Any], batch: Batch) -> None:
    """What a step does with its last micro-batch, the discriminator's part with the terms that some updates leave out
    among it."""
    counts, judge = task.counts(batch), task.discriminator
    loss = weighted(task.training_step(forward, batch), task.weights, counts)
    if judge is not None:
        trained = [parameter for parameter in judge.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        loss = loss + weighted(task.adversarial_step(judge, batch), task.adversarial_weights, counts)
    loss.backward()
    del loss
    if judge is not None:
        for parameter in trained:
            parameter.requires_grad_(True)
        batch |= {name: value.detach() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        weighted(task.discriminator_step(judge, batch, 0), task.discriminator_weights, counts).backward()


def beside(task: Task) -> list[nn.Module]:
    """What the task computes with besides its model: a discriminator, and networks that a loss looks with."""
    of_model = set(task.model.modules())
    return [value for value in vars(task).values() if isinstance(value, nn.Module) and value not in of_model]


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _forward(model: nn.Module, numbers: Numbers) -> Callable[..., Any]:
    """As DeepSpeed's engine calls the model: autocast is around its forward alone."""
    if numbers.autocast is None:
        return model

    def forward(*args, **kwargs):
        with torch.autocast("cpu", dtype=numbers.autocast):
            return model(*args, **kwargs)

    return forward


def _with_shapes(task: Task, dtype: torch.dtype, mode: FakeTensorMode) -> Task:
    """``task`` with modules that have no memory, and the model's parameters of ``dtype``."""
    shapes: dict[int, Any] = {}
    with mode:
        for module in (task.model, *beside(task)):
            shapes |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in module.buffers()}
            for parameter in module.parameters():
                empty = torch.empty(parameter.shape, dtype=dtype if module is task.model else parameter.dtype)
                shapes[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    task = copy.deepcopy(task, shapes)
    task.model.train()
    return task


def _bincount(values: torch.Tensor, weights: None = None, minlength: int = 0) -> torch.Tensor:
    """torch.bincount of values that are all below ``minlength``, as codes are: its shape depends on no value."""
    return values.new_empty(minlength)
