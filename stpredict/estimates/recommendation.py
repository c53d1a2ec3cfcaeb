"""Which ZeRO stage, micro-batch, recomputation and number of nodes a training wants, and why.

What is least is preferred: the fewest nodes that hold it, then the way that loses least time to communication and
recomputation, were nothing hidden; of those within ``ALIKE`` of the best, the one without recomputation, with the
fewest micro-batches, of the lowest stage.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from data_pipeline.errors import UsageError
from stpredict.estimates.communication import Collective, communication
from stpredict.estimates.duration import StepTime, Utilization, step_time
from stpredict.estimates.gpus import Gpu
from stpredict.estimates.memory import Memory, MemoryEstimator
from stpredict.estimates.planned import Planned
from stpredict.training.computing import ActivationCheckpointingConfig
from stpredict.training.config import TrainingConfig
from stpredict.training.flops import FORWARDS_PER_STEP

MARGIN = 0.1  # of a GPU's memory, left to CUDA, NCCL, what kernels need meanwhile, and fragments
ALIKE = 1.05
POLICIES = ("none", "selective", "layers")


@dataclass(frozen=True)
class Machine:
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gb_s: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Of each GPU."""
        return (1 - MARGIN) * self.gpu.memory_bytes


@dataclass(frozen=True)
class Way:
    """One way to compute the same training: with the largest micro-batch that fits, or one sample where none does."""

    training: TrainingConfig
    memory: Memory
    collectives: list[Collective]
    time: StepTime
    fits: bool
    ranks: int

    @property
    def policy(self) -> str:
        return self.training.activation_checkpointing.policy

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.training.accumulation_steps(self.ranks)

    @property
    def sent_bytes(self) -> float:
        """By each rank in a step."""
        return sum(collective.sent(self.ranks) for collective in self.collectives)

    @property
    def overrides(self) -> list[str]:
        return [
            f"resources.processes={self.ranks}",
            f"training.zero_stage={self.training.zero_stage}",
            f"training.micro_batch_size={self.training.micro_batch_size}",
            f"training.activation_checkpointing.policy={self.policy}",
        ]


def step_on(
    machine: Machine, planned: Planned, training: TrainingConfig, flops: float, utilization: Utilization
) -> tuple[list[Collective], StepTime]:
    """What a step of ``flops`` sends, and how long it takes; ``training.precision`` is what the machine computes in."""
    task, precision, recomputing = planned.task, training.precision, training.activation_checkpointing
    layers = [] if recomputing.policy == "none" else task.layers()[:: recomputing.every]
    collectives = communication(task.model, layers, training, precision, machine.ranks)
    time = step_time(
        flops,
        collectives,
        machine.gpu,
        precision,
        machine.nodes,
        machine.gpus_per_node,
        machine.network_gb_s,
        utilization,
        recomputing,
    )
    if planned.tokenizing and not utilization.tokenized:
        tokenizing_s = planned.tokenizing.seconds(training, machine.ranks, machine.gpu, utilization.mfu)
        time = replace(time, tokenizing_s=tokenizing_s)
    return collectives, time


class Ways:
    """Of one training, whose samples take ``flops_forward`` each."""

    def __init__(self, planned: Planned, memory: MemoryEstimator, flops_forward: float, utilization: Utilization):
        self.planned, self.task, self.training = planned, planned.task, planned.config.training
        self.memory, self.utilization = memory, utilization
        self.flops = FORWARDS_PER_STEP * flops_forward * self.training.batch_size

    def way(self, machine: Machine, training: TrainingConfig) -> Way:
        """``training`` as it stands. UsageError where its batch does not divide among the ranks."""
        ranks = machine.ranks
        micro_batch = training.batch_size // (ranks * training.accumulation_steps(ranks))
        precision = machine.gpu.precision(training.precision)
        training = training.model_copy(update={"precision": precision, "micro_batch_size": micro_batch})
        memory = self.memory.of(training, ranks, micro_batch)
        collectives, time = step_on(machine, self.planned, training, self.flops, self.utilization)
        return Way(training, memory, collectives, time, memory.total <= machine.usable_bytes, ranks)

    def all(self, machine: Machine) -> list[Way]:
        """A way for each stage that goes with the rest of the config; with recomputation where a rank's whole share of
        the batch does not fit without, at any stage. At ZeRO-0 on one rank alone: what does not fit several is better
        divided first. UsageError where the batch does not divide among the ranks."""
        found: list[Way] = []
        for policy in POLICIES if self.task.layers() else POLICIES[:1]:
            more = [self._largest(machine, changed) for changed in self._stages(policy, machine.ranks)]
            found += more
            if any(way.fits and way.accumulation == 1 for way in more):
                break
        return found

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
        training.accumulation_steps(machine.ranks)
        share = training.batch_size // machine.ranks
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        precision = machine.gpu.precision(training.precision)
        known = training.model_copy(update={"precision": precision})
        fitting = (s for s in sizes if self.memory.of(known, machine.ranks, s).total <= machine.usable_bytes)
        return self.way(machine, training.model_copy(update={"micro_batch_size": next(fitting, 1)}))


def best(ways: Iterable[Way]) -> Way | None:
    """None where none fits."""
    fitting = [way for way in ways if way.fits]
    if not fitting:
        return None
    least = min(way.time.without_overlap_s for way in fitting)
    alike = [way for way in fitting if way.time.without_overlap_s <= ALIKE * least]
    return min(alike, key=lambda way: (POLICIES.index(way.policy), way.accumulation, way.training.zero_stage))


def node_counts(batch_size: int, gpus_per_node: int) -> list[int]:
    """Nodes whose ranks share the batch evenly."""
    return [n for n in range(1, batch_size // gpus_per_node + 1) if batch_size % (n * gpus_per_node) == 0]


def reasons(chosen: Way, ways: list[Way], machine: Machine) -> list[str]:
    """In words, why ``chosen`` of ``ways``."""
    stage, micro_batch = chosen.training.zero_stage, chosen.training.micro_batch_size
    found = [_why_stage(chosen, [way for way in ways if way.policy == chosen.policy], machine)]
    if chosen.policy == "none":
        found.append("no recomputation: activations fit without")
    else:
        without = next(way for way in ways if way.policy == "none" and way.training.zero_stage == stage)
        size = without.training.micro_batch_size
        why = (
            f"without, {size} is the largest micro-batch that fits, and {without.accumulation} of them communicate more"
            if without.fits
            else f"without, a micro-batch of 1 takes {gigabytes(without.memory.total)} GB"
        )
        found.append(f"activation_checkpointing.policy {chosen.policy}: {why}")
    if chosen.accumulation == 1:
        found.append(f"micro-batch {micro_batch}: all of a rank's share of the batch, {_used(chosen, machine)}")
    else:
        share = chosen.training.batch_size // chosen.ranks
        found.append(
            f"micro-batch {micro_batch}: the largest divisor of a rank's {share} samples that fits, "
            f"{_used(chosen, machine)}; {chosen.accumulation} of them make a step"
        )
    return found


def _why_stage(chosen: Way, same_policy: list[Way], machine: Machine) -> str:
    stage = chosen.training.zero_stage
    lower = [way for way in same_policy if way.training.zero_stage < stage]
    if stage == 0:
        return "ZeRO-0: all of it fits on every GPU, so nothing has to be divided"
    if not lower:
        return f"ZeRO-{stage}: the lowest stage that goes with the rest of the config, and it fits"
    nearest = lower[-1]
    below = f"ZeRO-{nearest.training.zero_stage}"
    if not nearest.fits:
        usable = gigabytes(machine.usable_bytes)
        return (
            f"ZeRO-{stage}: the lowest that fits; {below} takes {gigabytes(nearest.memory.total)} of {usable} GB with "
            "a micro-batch of 1"
        )
    if nearest.accumulation > chosen.accumulation:
        return (
            f"ZeRO-{stage}: the lowest that fits with a micro-batch of {chosen.training.micro_batch_size}; {below} has "
            f"room for {nearest.training.micro_batch_size}"
        )
    more = nearest.time.without_overlap_s / chosen.time.without_overlap_s - 1
    return f"ZeRO-{stage}: {below} fits too, but its communication makes a step {100 * more:.0f} % longer"


def _used(way: Way, machine: Machine) -> str:
    return f"filling {gigabytes(way.memory.total)} of {gigabytes(machine.usable_bytes)} GB"


def gigabytes(number: float) -> str:
    """In 10^9 bytes, as precisely as an estimate is."""
    value = number / 1e9
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def check_nodes(batch_size: int, gpus_per_node: int) -> None:
    """UsageError where not even one node's ranks share the batch evenly."""
    if batch_size % gpus_per_node:
        those = [g for g in range(1, min(batch_size, 16) + 1) if batch_size % g == 0]
        raise UsageError(
            f"--gpus-per-node {gpus_per_node}: training.batch_size {batch_size} does not divide among them; "
            f"{', '.join(map(str, those))} would do"
        )
