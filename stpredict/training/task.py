"""What a model family supplies to the engine. No task mentions ranks, devices or DeepSpeed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.config import Config
from data_pipeline.order import Share

Batch = dict[str, Tensor | list[str]]
Sums = dict[str, Tensor]
Forward = Callable[..., object]


class TrainingBatches(Protocol):
    """This rank's training data (``data_pipeline.stream`` has it)."""

    #: Samples of each set that all ranks together have drawn: the position, which a checkpoint saves.
    consumed: dict[str, int]
    #: Of those that this rank has drawn since it began, how many could not be read and were replaced by others.
    replaced: int

    def draw(self, step: int, count: int) -> list[Batch]:
        """The ``count`` micro-batches of a step."""

    def close(self) -> None:
        """Ends what reads ahead."""


class Task(ABC):
    """A model, its data, and its losses and metrics as sums.

    Every term is returned as a *sum* over the batch and divided, by the engine, by the same term's count over all
    micro-batches and ranks. So the loss of a step does not depend on how its batch is split.
    """

    #: The module that is trained.
    model: nn.Module
    #: Loss terms and their weights; the other terms of ``training_step`` are metrics.
    weights: dict[str, float]

    #: A module trained against the model on the same batches, or none; its loss terms and their weights, and those by
    #: which the model learns from its judgement.
    discriminator: nn.Module | None = None
    discriminator_weights: Mapping[str, float] = MappingProxyType({})
    adversarial_weights: Mapping[str, float] = MappingProxyType({})
    #: The linear layer or convolution whose output the model returns unchanged, for the adaptive weight; or none.
    last_layer: nn.Module | None = None

    #: Names of the metrics that ``validation_metrics`` gives: what checkpoint.best and early_stopping may name.
    metrics: tuple[str, ...]

    #: Samples that stopped a data worker, and why. The engine restores and saves it with the checkpoint.
    quarantined: dict[str, str]

    def layers(self) -> Sequence[nn.Module]:
        """Of the model, in the order of its forward pass: what is recomputed (``training.activation_checkpointing``)
        and compiled (``training.compile``) one by one. They hold most of what the backward pass needs."""
        return ()

    def networks(self) -> Sequence[nn.Module]:
        """Those beside the model that never learn and that it is trained through, such as a perceptual loss's."""
        return ()

    @abstractmethod
    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        """Endless micro-batches, from where ``consumed`` samples of each set (counted over all ranks) are gone."""

    @abstractmethod
    def validation_batches(self, share: Share) -> Iterator[Batch]:
        """Every validation sample once; the same number of batches on every rank, padded with ``weight`` 0."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """Each term's denominator for this batch, known before the forward pass."""

    @abstractmethod
    def training_step(self, forward: Forward, batch: Batch) -> Sums:
        """The sum of each term over the batch, or how often each code was used: a vector of uses, of which share and
        perplexity are logged. ``forward`` calls the model. What is to be judged is put into ``batch``, with its graph;
        a loss reaches the model's parameters through what ``forward`` returns and in no other way."""

    def tokens(self, batch: Batch) -> int:
        """Tokens that the batch is for the model, for tokens/s; 0 where it has none."""
        return 0

    def forward_flops(self, *args: object, **kwargs: object) -> float | None:
        """FLOPs of a forward pass of the model on these arguments, of which only shapes may be looked at; None: the
        engine counts them."""
        return None

    def published_macs(self, computed: float) -> float:
        """Multiply-adds of one sample as papers print them, of a model whose forward pass takes ``computed``."""
        return computed

    def adversarial_step(self, judge: Forward, batch: Batch) -> Sums:
        """The sum of each of the model's adversarial terms over a batch that ``training_step`` has seen. ``judge``
        calls the discriminator, whose parameters get no gradient here. Not called before the discriminator's start."""
        raise NotImplementedError("a task with a discriminator says what the model learns from it")

    def discriminator_step(self, forward: Forward, batch: Batch, update: int) -> Sums:
        """The sum of each of the discriminator's terms over a batch that ``training_step`` has seen; what that put into
        it is detached by now. ``forward`` calls the discriminator, which has had ``update`` updates. A weighted term
        that is left out (R1 on most updates) is 0."""
        raise NotImplementedError("a task with a discriminator says how it learns")

    def discriminator_updated(self, means: Sums) -> None:  # noqa: B027 (most need none)
        """After an update: the mean of each term of ``discriminator_step`` over all micro-batches and ranks, which is
        the same on every rank (LeCam's averages move by it)."""

    @abstractmethod
    def validation_step(self, forward: Forward, batch: Batch) -> Sums:
        """Sums over the batch, weighted by ``batch["weight"]``; may be vectors (a histogram, for example)."""

    @abstractmethod
    def validation_metrics(self, sums: Sums) -> dict[str, float]:
        """``metrics`` by name, from the sums over the whole validation set."""

    @abstractmethod
    def picture(self, forward: Forward, batch: Batch) -> np.ndarray:
        """What a person would look at, from the first validation batch: frames uint8 ``(t, h, w, 3)``."""

    @abstractmethod
    def export_config(self) -> Config:
        """What, beside the weights, is needed to build the model again; has a field ``step``."""


def weighted(sums: Sums, weights: Mapping[str, float], counts: Mapping[str, float]) -> Tensor:
    """The loss: each term's sum over its count, times its weight. A term that is not among ``sums`` is 0."""
    return sum(weight * sums[name] / counts[name] for name, weight in weights.items() if name in sums)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """To a GPU from pinned memory: a copy from any other would wait for all that the GPU has yet to do."""

    def sent(value: Tensor) -> Tensor:
        pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        return pinned.to(device, non_blocking=True)

    return {key: sent(value) if torch.is_tensor(value) else value for key, value in batch.items()}


def add_to(total: Sums, sums: Sums) -> None:
    """Adds those of one more micro-batch, without their graph."""
    for name, value in sums.items():
        total[name] = total.get(name, 0) + value.detach()
