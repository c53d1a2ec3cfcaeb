"""Several trainings, each as its config says: a pipeline's, or a study's trials."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from data_pipeline.config import ClipConfig
from data_pipeline.errors import UsageError
from stpredict.estimates.disk import disk_of
from stpredict.estimates.estimate import Asked, Budget, budget_of, machine_of
from stpredict.estimates.machine import Machine
from stpredict.estimates.planned import plan_training
from stpredict.estimates.size import Size, size_of
from stpredict.estimates.ways import Way, Ways
from stpredict.jobs.config import TrainingJobConfig
from stpredict.tokenizers.config import CausalCnnConfig
from stpredict.training.flops import FORWARDS_PER_STEP

# What changes neither shapes, bytes nor times: trials that differ in these alone are estimated once.
ALIKE = {
    "run": True,
    "seed": True,
    "tokenizer": True,
    "training": {"optimizer": {"lr", "betas", "eps", "weight_decay"}, "schedule": True},
}


@dataclass(frozen=True)
class Row:
    """``way`` is as the config says; its memory is None where it was not asked for. ``without_tokenizer``: one
    runs in its steps that is not known, and not counted."""

    name: str
    size: Size
    budget: Budget
    way: Way
    disk_bytes: int
    without_tokenizer: bool = False

    @property
    def machine(self) -> Machine:
        return self.way.machine

    @property
    def seconds(self) -> float:
        return self.budget.steps * self.way.time.step_s

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.machine.ranks

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.size.parameters,
            "macs_forward": self.size.macs_forward,
            "flops": FORWARDS_PER_STEP * self.size.flops_forward * self.budget.samples,
            "budget": asdict(self.budget),
            "gpu": self.machine.gpu.name,
            "ranks": self.machine.ranks,
            "nodes": self.machine.nodes,
            "zero_stage": self.way.training.zero_stage,
            "memory_bytes": self.way.memory and self.way.memory.total,
            "usable_bytes": self.machine.usable_bytes,
            "step_s": self.way.time.step_s,
            "without_tokenizer": self.without_tokenizer,
            "days": self.seconds / 86400,
            "gpu_hours": self.gpu_hours,
            "disk_bytes": self.disk_bytes,
        }


def estimate_several(
    trainings: Mapping[str, TrainingJobConfig],
    asked: Asked,
    with_memory: bool,
    tokenizers: Mapping[str, tuple[CausalCnnConfig, ClipConfig] | None] = MappingProxyType({}),
) -> list[Row]:
    """A row for each; ``tokenizers`` are those that run in a prior's steps. UsageError names the one whose batch does
    not divide among its ranks."""
    known: dict[str, Row] = {}
    rows = []
    for name, config in trainings.items():
        tokenizer = tokenizers.get(name)
        key = str((config.model_dump(mode="json", exclude=ALIKE), tokenizer))
        if key not in known:
            try:
                known[key] = _row(name, config, tokenizer, asked, with_memory)
            except UsageError as error:
                raise UsageError(f"job {name!r}: {error}") from None
        rows.append(replace(known[key], name=name))
    return rows


def _row(
    name: str,
    config: TrainingJobConfig,
    tokenizer: tuple[CausalCnnConfig, ClipConfig] | None,
    asked: Asked,
    with_memory: bool,
) -> Row:
    planned, training = plan_training(config, tokenizer), config.training
    size, machine = size_of(planned), machine_of(config, asked)
    way = Ways(planned, size.flops_forward, asked.utilization, with_memory).way(machine, training)
    budget = budget_of(training, size, asked.tokens)
    disk = disk_of(planned, training.model_copy(update={"steps": budget.steps}), machine.ranks)
    return Row(name, size, budget, way, disk.peak, planned.tokenizes and tokenizer is None)


def makespan_s(seconds: Sequence[float], at_once: int) -> float:
    """Until all are done, where ``at_once`` run side by side and each begins when one before it has ended."""
    ends = [0.0] * max(1, min(at_once, len(seconds)))
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)
