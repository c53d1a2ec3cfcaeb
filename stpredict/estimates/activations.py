"""What a micro-batch's forward and backward pass keep in memory, operator by operator, from shapes alone.

The task's own training step is run on tensors that have shapes and no memory, with the activation checkpointing that
the learner would apply.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from stpredict.estimates.cuda_kernels import cuda_kernels
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.estimates.planned import Planned
from stpredict.estimates.shapes import TaskOfShapes, modules
from stpredict.training.activation_checkpointing import recompute
from stpredict.training.adaptive_weight import AdaptiveWeight
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
    are ``finished``.

    With a discriminator there is the same of its step, and what a micro-batch keeps for that, ``judged`` bytes per
    sample.
    """

    fixed: np.ndarray
    per_sample: np.ndarray
    finished: np.ndarray
    discriminator: "Activations | None" = None
    judged: float = 0

    def bytes(self, micro_batch: int) -> np.ndarray:
        return self.fixed + micro_batch * self.per_sample


def follow(
    planned: Planned, checkpointing: ActivationCheckpointingConfig, numbers: Numbers, device: str
) -> Activations:
    """``device``: cuda or cpu, whose kernels keep different things."""
    few, more = (_Followed(planned, checkpointing, numbers, device, micro_batch) for micro_batch in MEASURED)
    discriminator = None
    if planned.task.discriminator is not None:
        discriminator = _line(few.discriminator, more.discriminator)
    found = _line(few.model, more.model)
    return replace(found, discriminator=discriminator, judged=few.judged / MEASURED[0])


def _line(few: "_Moments", more: "_Moments") -> Activations:
    per_sample = (np.array(more.alive) - np.array(few.alive)) / (MEASURED[1] - MEASURED[0])
    return Activations(few.alive - MEASURED[0] * per_sample, per_sample, np.array(few.finished, dtype=np.float64))


class _Moments:
    """Of one step of ``trained``: bytes that are alive, and elements whose gradients are finished."""

    def __init__(self, trained: nn.Module):
        self.alive: list[int] = []
        self.finished: list[int] = []
        self.done = 0
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._finish)

    def note(self, alive: int) -> None:
        self.alive.append(alive)
        self.finished.append(self.done)

    def _finish(self, parameter: nn.Parameter) -> None:
        self.done += parameter.numel()
        parameter.grad = None


class _Followed:
    """A micro-batch through the model's step, and through the discriminator's, as the learner and the adversary have
    them (R1 is computed)."""

    def __init__(
        self,
        planned: Planned,
        checkpointing: ActivationCheckpointingConfig,
        numbers: Numbers,
        device: str,
        micro_batch: int,
    ):
        shapes = TaskOfShapes(planned.task, numbers.weights)
        self.task, self.numbers = shapes.task, numbers
        recompute(self.task.layers(), checkpointing)
        adaptive = planned.config.training.discriminator.adaptive_weight
        self.model, self.judged = _Moments(self.task.model), 0.0
        self._now = self.model
        live = LiveBytes(lambda: self._now.note(live.bytes))
        with ExitStack() as stack:
            for context in (shapes.entered(), cuda_kernels() if device == "cuda" else nullcontext()):
                stack.enter_context(context)
            self.adaptive = _adaptive_weight(self.task) if adaptive and self.task.discriminator is not None else None
            for module in [*modules(self.task), *([self.adaptive.layer] if self.adaptive else [])]:
                live.ignore((*module.parameters(), *module.buffers()))
            stack.enter_context(live)
            batch = planned.batch(micro_batch, device="cpu")
            sums = self._model_learns(batch)
            self.model.note(live.bytes)
            if self.task.discriminator is not None:
                for name, value in batch.items():
                    if torch.is_tensor(value):
                        batch[name] = value.detach()
                        self.judged += value.nbytes
                self._now = self.discriminator = _Moments(self.task.discriminator)
                self._discriminator_learns(batch)
                del sums  # the learner's, until here

    def _model_learns(self, batch: Batch) -> Any:
        task, counts = self.task, self.task.counts(batch)
        forward = _forward(task.model, self.numbers)
        if task.discriminator is None:
            sums = task.training_step(forward, batch)
            weighted(sums, task.weights, counts).backward()
            return sums
        cut = self.adaptive.cut(forward) if self.adaptive else None
        sums = dict(task.training_step(cut or forward, batch))
        loss = weighted(sums, task.weights, counts)
        task.discriminator.requires_grad_(False)
        told = task.adversarial_step(task.discriminator, batch)
        sums |= told
        adversarial = weighted(told, task.adversarial_weights, counts)
        with patch.object(torch.distributed, "all_reduce", lambda tensor: None):
            loss = self.adaptive.combined(cut, loss, adversarial) if cut else loss + adversarial
        loss.backward()
        task.discriminator.requires_grad_(True)
        return sums

    def _discriminator_learns(self, batch: Batch) -> None:
        sums = self.task.discriminator_step(self.task.discriminator, batch, 0)
        weighted(sums, self.task.discriminator_weights, self.task.counts(batch)).backward()


def _adaptive_weight(task: Task) -> AdaptiveWeight:
    """As it is after the first step, which looks at values. The last layer's output is the model's first."""
    adaptive = AdaptiveWeight(task, SimpleNamespace(device=torch.device("cpu")), accumulation=1)
    adaptive.last, adaptive.checked = [0], True
    return adaptive


def _forward(model: nn.Module, numbers: Numbers) -> Callable[..., Any]:
    """As DeepSpeed's engine calls the model: autocast is around its forward alone."""
    if numbers.autocast is None:
        return model

    def forward(*args, **kwargs):
        with torch.autocast("cpu", dtype=numbers.autocast):
            return model(*args, **kwargs)

    return forward
