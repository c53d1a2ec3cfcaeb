"""What offloading costs in a step: bytes that go between a GPU and its host's memory, and the update on the CPU.

As DeepSpeed 0.19 does it (``stage_1_and_2.py``, ``stage3.py``), for each weight of a rank's share in A
micro-batches, where gradients are added up in fp32 and computed in bf16:

| ZeRO | gradients, bytes   | weights, bytes               |                                                        |
|------|--------------------|------------------------------|--------------------------------------------------------|
| 1, 2 | 4                  | 2 after the update           | other sums: 4, and 2 (2 A - 1) where A is above 1      |
| 3    | 8 A + 4            | 2 after the update           | each sum is fetched back, also the first               |

``offload.parameters``: a rank's share of whatever ZeRO-3 gathers comes from the host. Both directions are queued one
after the other.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from stpredict.estimates.communication import Beside
from stpredict.estimates.zero3_gathers import gathered, thresholds
from stpredict.training.config import TrainingConfig
from stpredict.training.precision import BYTES

# Parameters a node's CPUs update in a second, all its ranks together. Assumed: Adam reads 16 bytes for each and writes
# 12, and a host's memory moves some 100 GB/s.
UPDATED_PER_S = 3e9


@dataclass(frozen=True)
class Transfer:
    """``moved`` bytes of one rank in a step, in both directions together; ``beside`` as a ``Collective``'s."""

    what: str
    moved: float
    beside: Beside


def transfers(
    model: nn.Module, recomputed: Collection[nn.Module], training: TrainingConfig, precision: str, ranks: int
) -> list[Transfer]:
    """Of one step; none where nothing is offloaded. ``precision`` as for ``communication``."""
    offload, stage = training.offload, training.zero_stage
    micro_batches, share, width = training.accumulation_steps(ranks), _trained(model) / ranks, BYTES[precision]
    added = BYTES[training.accumulation_dtype]
    overlaps = training.deepspeed.get("zero_optimization", {}).get("overlap_comm", stage == 3)
    beside: Beside = "backward" if overlaps and (stage > 1 or micro_batches == 1) else None
    found = []
    if offload.optimizer == "cpu":
        if stage == 3:
            each = 2 * added * micro_batches + 4
        elif added == 4 and precision != "fp32":  # sums are kept on the GPU
            each = 4
        else:
            each = 4 + width * (2 * micro_batches - 1) * (micro_batches > 1)
        found.append(Transfer("gradients", each * share, beside))
    if (offload.optimizer == "cpu") != (offload.parameters == "cpu"):
        found.append(Transfer("weights, after the update", width * share, None))
    if offload.parameters == "cpu":
        counted = gathered(model, recomputed, thresholds(training))
        elements = micro_batches * counted.per_micro_batch + counted.per_step
        found.append(
            Transfer("weights, as they are needed", width * elements / ranks, "computation" if overlaps else None)
        )
    return found


def update_s(model: nn.Module, training: TrainingConfig, nodes: int) -> float:
    """Seconds of an update on the CPUs of ``nodes`` nodes, while GPUs wait; 0 where they update themselves."""
    return _trained(model) / nodes / UPDATED_PER_S if training.offload.optimizer == "cpu" else 0.0


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
