"""How often ZeRO-3 gathers weights: DeepSpeed 0.19's fetching and releasing, played through without tensors.

What is gathered is not three times the model, nor twice: a weight stays where it is used again within
``max_reuse_distance`` weights, or where fetching ahead has looked past its next use, so that small models are gathered
once a micro-batch and only large ones again for the backward pass. The rules are those of
deepspeed/runtime/zero/partitioned_param_coordinator.py (fetch_sub_module, release_sub_module, reset_step); the test of
this file holds them to the bytes that DeepSpeed moves.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from stpredict.training.config import TrainingConfig


class Thresholds(NamedTuple):
    """Weights, as numbers of elements; DeepSpeed's defaults."""

    persistence: int = 100_000  # one with no more is never released within a step
    model_persistence: int = 2**63 - 1  # of all those together
    live: int = 1_000_000_000  # nothing is fetched ahead beyond
    reuse_distance: int = 1_000_000_000
    prefetch: int = 50_000_000  # fetched ahead at once


class Gathered(NamedTuple):
    """Elements. ``live`` is the most that is there at once, beside the rank's own shares."""

    per_micro_batch: int
    per_step: int
    live: int


class _Use(NamedTuple):
    """A module's hook: its own weights are fetched before it runs, forward or backward, and released after it."""

    module: nn.Module
    fetch: bool


def thresholds(training: TrainingConfig) -> Thresholds:
    """Those of ``training.deepspeed``, under either of DeepSpeed's names."""
    given = training.deepspeed.get("zero_optimization", {})
    names = {
        "persistence": "param_persistence_threshold",
        "model_persistence": "model_persistence_threshold",
        "live": "max_live_parameters",
        "reuse_distance": "max_reuse_distance",
        "prefetch": "prefetch_bucket_size",
    }
    default = Thresholds()
    values = {
        ours: int(given.get(f"stage3_{theirs}", given.get(theirs, getattr(default, ours))))
        for ours, theirs in names.items()
    }
    return Thresholds(**values)


def gathered(model: nn.Module, recomputed: Collection[nn.Module], limits: Thresholds) -> Gathered:
    """Of one micro-batch (forward, backward and, of the layers ``recomputed``, forward again), and once a step. Modules
    are taken to run in the order in which they are registered."""
    uses = [*_forward(model), *_backward(model, set(recomputed))]
    persistent, total = set(), 0
    for parameter in model.parameters():
        if parameter.numel() <= limits.persistence and parameter.numel() + total <= limits.model_persistence:
            persistent.add(parameter)
            total += parameter.numel()
    coordinator = _Coordinator(uses, persistent, limits)
    for use in uses:
        (coordinator.fetch if use.fetch else coordinator.release)(use.module)
    return Gathered(coordinator.gathered, total, coordinator.most + total)


def _forward(module: nn.Module) -> Iterator[_Use]:
    if not _runs(module):
        for child in module.children():
            yield from _forward(child)
        return
    yield _Use(module, True)
    for child in module.children():
        yield from _forward(child)
    yield _Use(module, False)


def _backward(module: nn.Module, recomputed: set[nn.Module]) -> Iterator[_Use]:
    children = list(module.children())
    if _runs(module):
        yield _Use(module, True)
    if module in recomputed:
        for child in children:
            yield from _forward(child)
    for child in reversed(children):
        yield from _backward(child, recomputed)
    if _runs(module):
        yield _Use(module, False)


def _runs(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


@dataclass
class _Coordinator:
    """One micro-batch of DeepSpeed's PartitionedParameterCoordinator, once it knows the order of the modules."""

    uses: list[_Use]
    persistent: set[nn.Parameter]
    limits: Thresholds
    step: int = 0
    gathered: int = 0
    most: int = 0
    _live: int = 0
    _queue: deque = field(init=False)
    _order: list[nn.Module] = field(init=False)

    def __post_init__(self):
        self._order = [use.module for use in self.uses if use.fetch]
        self._queue = deque((p, step) for step, module in enumerate(self._order) for p in _own(module))
        self._available = set(self.persistent)
        self._in_use: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
        self._looked_to: dict[nn.Parameter, int] = defaultdict(lambda: -1)

    def fetch(self, module: nn.Module) -> None:
        own = _own(module)
        self._gather([p for p in own if p not in self._available])
        for parameter in own:
            self._in_use[parameter].add(module)
        for _ in [p for p in own if self._looked_to[p] < self.step]:
            parameter, self._looked_to[parameter] = self._next()
        self._fetch_ahead()
        self.step += 1

    def _fetch_ahead(self) -> None:
        room = min(self.limits.live - self._live, self.limits.prefetch)
        ahead: set[nn.Parameter] = set()
        elements = 0
        while self._queue and elements < room:
            parameter, step = self._next()
            self._looked_to[parameter] = max(self._looked_to[parameter], step)
            if parameter not in self._available and parameter not in ahead:
                ahead.add(parameter)
                elements += parameter.numel()
        self._gather(ahead)

    def release(self, module: nn.Module) -> None:
        own = _own(module)
        if not own:
            return
        released = {p for p in own if p not in self.persistent and self._looked_to[p] <= self.step}
        passed = 0
        for later in self._order[self.step :]:
            if passed >= self.limits.reuse_distance or not released:
                break
            for parameter in _own(later):
                released.discard(parameter)
                passed += parameter.numel()
        for parameter in own:
            self._in_use[parameter].discard(module)
            if parameter in released and parameter in self._available and not self._in_use[parameter]:
                self._available.remove(parameter)
                self._live -= parameter.numel()

    def _next(self) -> tuple[nn.Parameter, int]:
        return self._queue.popleft()

    def _gather(self, parameters: Collection[nn.Parameter]) -> None:
        elements = sum(p.numel() for p in parameters)
        self._available.update(parameters)
        self.gathered += elements
        self._live += elements
        self.most = max(self.most, self._live)
