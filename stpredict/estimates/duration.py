"""How long a training takes: its FLOPs at an assumed or measured MFU, what the ranks send at the links' speed, and what
offloading adds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import UserError
from stpredict.estimates.communication import Beside, Collective
from stpredict.estimates.gpus import Gpu
from stpredict.estimates.machine import Machine
from stpredict.estimates.offloading import Transfer
from stpredict.run import Run
from stpredict.training.computing import ActivationCheckpointingConfig
from stpredict.training.flops import FORWARDS_PER_STEP

ASSUMED_MFU = 0.4
NETWORK_GB_S = 25.0  # of one GPU to other nodes: an HDR InfiniBand card of 200 Gb/s for each


def work(config: ActivationCheckpointingConfig) -> float:
    """FLOPs that are computed for each that counts: with ``layers``, their forward pass is made twice (up to 4/3, since
    what is beside the layers is not); ``selective`` computes again what costs next to nothing."""
    return 1 + 1 / FORWARDS_PER_STEP / config.every if config.policy == "layers" else 1.0


@dataclass(frozen=True)
class Utilization:
    """``mfu`` while a training computes and recomputes nothing. ``run`` is where it was measured, and ``mfu_of_run``
    what that run says of its whole steps."""

    mfu: float = ASSUMED_MFU
    source: Literal["assumed", "measured"] = "assumed"
    run: str | None = None
    mfu_of_run: float | None = None


@dataclass(frozen=True)
class Sending:
    """Seconds, by what goes on beside: nothing, the backward pass, all computation."""

    waited_for_s: float = 0.0
    beside_backward_s: float = 0.0
    beside_computation_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.waited_for_s + self.beside_backward_s + self.beside_computation_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: ``forward_s`` is a part of ``computation_s``; ``between_gpus`` and ``with_host`` are what
    sending takes if nothing else goes on; ``update_s`` is the CPU's, of what is offloaded to it. ``tokenizing_s`` is
    before each micro-batch, ``judging_s`` what a discriminator and the networks of losses take, on average."""

    computation_s: float
    forward_s: float
    between_gpus: Sending = Sending()
    with_host: Sending = Sending()
    update_s: float = 0.0
    tokenizing_s: float = 0.0
    judging_s: float = 0.0

    @property
    def step_s(self) -> float:
        """At best: gradients go beside the backward pass that makes them, weights beside the rest too, and both share a
        stream's time."""
        both = self.between_gpus, self.with_host
        gradients, weights = sum(s.beside_backward_s for s in both), sum(s.beside_computation_s for s in both)
        busy = max(self.computation_s, self.forward_s + gradients, gradients + weights)
        return self.tokenizing_s + self.judging_s + busy + sum(s.waited_for_s for s in both) + self.update_s

    @property
    def without_overlap_s(self) -> float:
        sending = self.between_gpus.total_s + self.with_host.total_s
        return self.tokenizing_s + self.judging_s + self.computation_s + sending + self.update_s


def bandwidth(gpu: Gpu, nodes: int, gpus_per_node: int, network_gb_s: float) -> float:
    """Bytes/s that each rank sends in a ring over all: within a node its link; between nodes as many rings as a node
    has GPUs share the nodes' cards, so that each rank has those of all."""
    inside = gpu.link_gb_s * 1e9
    if nodes == 1:
        return inside
    across = gpus_per_node * network_gb_s * 1e9
    return across if gpus_per_node == 1 else min(inside, across)


def step_time(
    flops: float,
    collectives: Sequence[Collective],
    moved: Sequence[Transfer],
    update_s: float,
    machine: Machine,
    precision: str,
    mfu: float,
    recomputing: ActivationCheckpointingConfig,
) -> StepTime:
    """``flops`` are the model's, of a step of all ranks: three forwards."""
    gpu, ranks = machine.gpu, machine.ranks
    counted_s = flops / (ranks * gpu.tflops(precision) * 1e12 * mfu)
    link = bandwidth(gpu, machine.nodes, machine.gpus_per_node, machine.network_gb_s)
    return StepTime(
        computation_s=counted_s * work(recomputing),
        forward_s=counted_s / FORWARDS_PER_STEP,
        between_gpus=_sending([(c.sent(ranks), c.beside) for c in collectives], link),
        with_host=_sending([(t.moved, t.beside) for t in moved], gpu.host_gb_s * 1e9),
        update_s=update_s,
    )


def _sending(parts: list[tuple[float, Beside]], speed: float) -> Sending:
    def seconds(beside: Beside) -> float:
        return sum(sent for sent, when in parts if when == beside) / speed

    return Sending(seconds(None), seconds("backward"), seconds("computation"))


def median_mfu(run: Run) -> float:
    """Of a run's whole steps. UserError where it has none."""
    if not run.metrics_path.is_file():
        raise UserError(f"--mfu-from {run.path}: there is no metrics.jsonl; give the directory of a training's run")
    try:
        found = [row["mfu"] for row in run.metrics() if isinstance(row.get("mfu"), float | int)]
    except ValueError as error:
        raise UserError(f"--mfu-from {run.path}: metrics.jsonl is damaged ({error})") from None
    if not found:
        raise UserError(
            f"--mfu-from {run.path}: its metrics.jsonl has no mfu, as on a CPU, or on a GPU whose peak is not known; "
            "give --mfu, or train with training.peak_tflops"
        )
    return statistics.median(found)


def while_computing(mfu: float, time: StepTime, run: Run) -> float:
    """The MFU while it computes of a ``run`` whose whole steps reach ``mfu``. ``time`` is the estimate of such a step
    at ``mfu``: what is waited for in it is taken out, and what is computed again is counted. UserError where nothing
    would be left."""
    both = time.between_gpus, time.with_host
    gradients = sum(s.beside_backward_s for s in both)
    hidden = gradients + sum(s.beside_computation_s for s in both)
    whole = FORWARDS_PER_STEP * time.forward_s
    busy = whole - sum(s.waited_for_s for s in both) - time.update_s
    if hidden >= busy:
        raise UserError(
            f"--mfu-from {run.path}: its steps take {whole:.2g} s, and what they send takes as long at the links' "
            "assumed speed: give --mfu"
        )
    computed, beside = time.computation_s / whole, (time.tokenizing_s + time.judging_s) / whole  # per FLOP that counts
    forward = 1 / FORWARDS_PER_STEP
    return mfu * whole / min(busy / (computed + beside), (busy - gradients) / (forward + beside))
