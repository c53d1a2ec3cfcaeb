"""The ways in which one training can be computed: each ZeRO stage with the largest micro-batch that fits, without and
with recomputation; and what a step of each takes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from stpredict.estimates.communication import Collective, communication, of_discriminator
from stpredict.estimates.duration import StepTime, Utilization, step_time
from stpredict.estimates.judging import model_learns
from stpredict.estimates.machine import Machine
from stpredict.estimates.memory import Memory, MemoryEstimator
from stpredict.estimates.offloading import Transfer, transfers, update_s
from stpredict.estimates.planned import Planned
from stpredict.training.compilation import compiles
from stpredict.training.computing import ActivationCheckpointingConfig
from stpredict.training.config import TrainingConfig
from stpredict.training.flops import FORWARDS_PER_STEP

POLICIES = ("none", "selective", "layers")


@dataclass(frozen=True)
class Way:
    """One way to compute the same training on ``machine``. ``memory`` is None where it was not asked for. ``compiled``:
    by torch.compile."""

    training: TrainingConfig
    machine: Machine
    memory: Memory | None
    collectives: list[Collective]
    transfers: list[Transfer]
    time: StepTime
    compiled: bool

    @property
    def fits(self) -> bool:
        return self.memory is None or self.memory.total <= self.machine.usable_bytes

    @property
    def policy(self) -> str:
        return self.training.activation_checkpointing.policy

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.training.accumulation_steps(self.machine.ranks)

    @property
    def sent_bytes(self) -> float:
        """To other GPUs, by each in a step."""
        return sum(collective.sent(self.machine.ranks) for collective in self.collectives)

    @property
    def host_bytes(self) -> int:
        """In the memory of each node."""
        return self.machine.gpus_per_node * self.memory.host

    @property
    def overrides(self) -> list[str]:
        return [
            f"resources.processes={self.machine.ranks}",
            f"training.zero_stage={self.training.zero_stage}",
            f"training.micro_batch_size={self.training.micro_batch_size}",
            f"training.activation_checkpointing.policy={self.policy}",
        ]


class Ways:
    """Of one training, whose samples take ``flops_forward`` each."""

    def __init__(self, planned: Planned, flops_forward: float, utilization: Utilization, with_memory: bool = True):
        self.task, self.training = planned.task, planned.config.training
        self.tokenizing, self.judging = planned.tokenizing, planned.judging
        self.memory = MemoryEstimator(planned) if with_memory else None
        self.utilization = utilization
        backward = (FORWARDS_PER_STEP - 1) * model_learns(self.task, self.training.discriminator)
        self.flops = (1 + backward) * flops_forward * self.training.batch_size

    def way(self, machine: Machine, training: TrainingConfig) -> Way:
        """``training`` as it stands. UsageError where its batch does not divide among the ranks."""
        ranks, recomputing = machine.ranks, training.activation_checkpointing
        micro_batch = training.batch_size // (ranks * training.accumulation_steps(ranks))
        precision = machine.gpu.precision(training.precision)
        training = training.model_copy(update={"precision": precision, "micro_batch_size": micro_batch})
        model, layers = self.task.model, self.task.layers()
        recomputed = [] if recomputing.policy == "none" else layers[:: recomputing.every]
        collectives = communication(model, recomputed, training, precision, ranks)
        collectives += of_discriminator(self.task.discriminator, training, ranks)
        moved = transfers(model, recomputed, training, precision, ranks)
        update, mfu = update_s(model, training, machine.nodes), self.utilization.mfu
        time = step_time(self.flops, collectives, moved, update, machine, precision, mfu, recomputing)
        if self.tokenizing:
            time = replace(time, tokenizing_s=self.tokenizing.seconds(training, ranks, machine.gpu, mfu))
        if self.judging:
            time = replace(time, judging_s=self.judging.seconds(training, ranks, machine.gpu, mfu))
        return Way(
            training,
            machine,
            self.memory.of(training, ranks, micro_batch) if self.memory else None,
            collectives,
            moved,
            time,
            compiles(layers, training, torch.device("cuda")),
        )

    def all(self, machine: Machine) -> list[Way]:
        """A way for each stage that goes with the rest of the config; with recomputation where a rank's whole share of
        the batch does not fit without, at any stage. At ZeRO-0 on one rank alone: what does not fit several is better
        divided first. UsageError where the batch does not divide among the ranks."""
        found: list[Way] = []
        for policy in self._policies():
            more = [self._largest(machine, changed) for changed in self._stages(policy, machine.ranks)]
            found += more
            if any(way.fits and way.accumulation == 1 for way in more):
                break
        return found

    def _policies(self) -> list[str]:
        if not self.task.layers():
            return ["none"]
        return [policy for policy in POLICIES if not (policy == "selective" and self.training.compile is True)]

    def _stages(self, policy: str, ranks: int) -> Iterator[TrainingConfig]:
        training = self.training
        every = training.activation_checkpointing.every if policy != "none" else 1
        recomputing = ActivationCheckpointingConfig(policy=policy, every=every)
        whole = training.offload.optimizer == "none" and training.accumulation_dtype == "fp32"
        first = 3 if training.offload.parameters != "none" else 0 if whole and (policy == "none" or ranks == 1) else 1
        for stage in range(first, 4):
            yield training.model_copy(
                update={"zero_stage": stage, "activation_checkpointing": recomputing, "micro_batch_size": None}
            )

    def _largest(self, machine: Machine, training: TrainingConfig) -> Way:
        """With the largest micro-batch that fits, or one sample where none does."""
        training.accumulation_steps(machine.ranks)
        share = training.batch_size // machine.ranks
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        precision = machine.gpu.precision(training.precision)
        known = training.model_copy(update={"precision": precision})
        fitting = (s for s in sizes if self.memory.of(known, machine.ranks, s).total <= machine.usable_bytes)
        return self.way(machine, training.model_copy(update={"micro_batch_size": next(fitting, 1)}))
