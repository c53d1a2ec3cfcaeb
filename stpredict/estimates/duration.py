"""How long a training takes: its FLOPs at an assumed or measured MFU, and what the ranks send at the links' speed."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.errors import UsageError, UserError
from stpredict.estimates.communication import Collective
from stpredict.estimates.gpus import Gpu
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
    """``mfu`` is of the model's FLOPs, without what is computed again, in a training that recomputed ``work`` as
    ``work()`` has it. A measured one has its communication in it, and what it ``tokenized`` in its steps."""

    mfu: float
    source: Literal["assumed", "measured"]
    work: float = 1.0
    run: str | None = None
    tokenized: bool = False


def assumed(mfu: float = ASSUMED_MFU) -> Utilization:
    """UsageError where it is no share."""
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu {mfu:g}: a share of the GPU's peak, above 0 and at most 1; 0.4 is usual")
    return Utilization(mfu, "assumed")


def measured(run: Path, recomputing: ActivationCheckpointingConfig, tokenized: bool = False) -> Utilization:
    """The median of a run's, which recomputed and ``tokenized`` as it says. UserError where it has none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--mfu-from {run}: there is no metrics.jsonl; give the directory of a training's run")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"--mfu-from {run}: metrics.jsonl is damaged ({error})") from None
    found = [row["mfu"] for row in rows if isinstance(row.get("mfu"), float | int)]
    if not found:
        raise UserError(
            f"--mfu-from {run}: its metrics.jsonl has no mfu, as on a CPU, or on a GPU whose peak is not known; give "
            "--mfu, or train with training.peak_tflops"
        )
    return Utilization(statistics.median(found), "measured", work(recomputing), str(run), tokenized)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. ``communication`` is what the links need if nothing else went on; where it is ``hidden`` it
    runs beside the computation. ``tokenizing`` is before each micro-batch."""

    computation_s: float
    hidden_s: float
    exposed_s: float
    includes_communication: bool
    tokenizing_s: float = 0.0

    @property
    def communication_s(self) -> float:
        return self.hidden_s + self.exposed_s

    @property
    def step_s(self) -> float:
        if self.includes_communication:
            return self.tokenizing_s + self.computation_s
        return self.tokenizing_s + max(self.computation_s, self.hidden_s) + self.exposed_s

    @property
    def without_overlap_s(self) -> float:
        return self.tokenizing_s + self.computation_s + self.communication_s


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
    collectives: list[Collective],
    gpu: Gpu,
    precision: str,
    nodes: int,
    gpus_per_node: int,
    network_gb_s: float,
    utilization: Utilization,
    recomputing: ActivationCheckpointingConfig,
) -> StepTime:
    """``flops`` are the model's, of a step of all ranks: three forwards."""
    ranks = nodes * gpus_per_node
    computed = flops * work(recomputing) / utilization.work
    speed = bandwidth(gpu, nodes, gpus_per_node, network_gb_s)
    seconds = {
        hidden: sum(c.sent(ranks) for c in collectives if c.hidden is hidden) / speed for hidden in (True, False)
    }
    return StepTime(
        computation_s=computed / (ranks * gpu.tflops(precision) * 1e12 * utilization.mfu),
        hidden_s=seconds[True],
        exposed_s=seconds[False],
        includes_communication=utilization.source == "measured",
    )
