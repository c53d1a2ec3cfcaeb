"""What ranks send each other in a step, as DeepSpeed 0.19 does it with our settings.

| ZeRO | gradients                                  | weights                                                    |
|------|--------------------------------------------|------------------------------------------------------------|
| 0    | one all-reduce a step                      | none                                                       |
| 1    | one all-reduce a step                      | one all-gather a step, after the update                    |
| 2    | one all-reduce for each micro-batch        | one all-gather a step, after the update                    |
| 3    | one reduce-scatter for each micro-batch    | all-gathers as they are needed (``zero3_gathers``)         |

At ZeRO 1 and 2 it is an all-reduce, twice the traffic of a reduce-scatter, unless
``deepspeed.zero_optimization.use_multi_rank_bucket_allreduce`` is false. Left out: the engine's own all-reduces of a
few numbers (counts, loss, gradient norm), batch statistics, and validation. A discriminator's gradients are all-reduced
once in a step in which it learns, at every stage (``of_discriminator``).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn

from stpredict.estimates.zero3_gathers import gathered, thresholds
from stpredict.training.config import TrainingConfig
from stpredict.training.precision import BYTES

Kind = Literal["all-reduce", "reduce", "reduce-scatter", "all-gather"]
Beside = Literal["backward", "computation"] | None  # what goes on meanwhile; None: it is waited for


@dataclass(frozen=True)
class Collective:
    """``tensor_bytes`` are those of the whole tensors, of all micro-batches of a step. Gradients can be sent ``beside``
    the backward pass that makes them, weights beside all computation."""

    what: str
    kind: Kind
    tensor_bytes: float
    beside: Beside

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends (and receives) in a step, in a ring; a reduce's on average over the ranks."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.tensor_bytes * (ranks - 1) / ranks


def communication(
    model: nn.Module,
    recomputed: Collection[nn.Module],
    training: TrainingConfig,
    precision: str,
    ranks: int,
) -> list[Collective]:
    """Of one step; none for one rank. ``precision`` is what ``training.precision`` comes to. UsageError where the batch
    does not divide among ``ranks``."""
    micro_batches = training.accumulation_steps(ranks)
    if ranks == 1:
        return []
    stage, settings = training.zero_stage, training.deepspeed.get("zero_optimization", {})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = trained * BYTES[training.accumulation_dtype]
    weights = trained * BYTES[precision]
    scattered, overlaps = settings.get("reduce_scatter", True), settings.get("overlap_comm")
    # ZeRO-1 in bf16 with sums in fp32 is another optimizer of DeepSpeed's, BF16_Optimizer, which knows one way only.
    on_device = training.offload.optimizer == "none"
    plain = stage == 1 and precision == "bf16" and training.accumulation_dtype == "fp32" and on_device
    if stage == 0:
        return [Collective("gradients, once a step", "all-reduce", each, None)]
    if stage < 3:
        own = scattered and not settings.get("use_multi_rank_bucket_allreduce", True) and not plain
        kind: Kind = "reduce" if own else "all-reduce"
        how_often, times = ("once a step", 1) if stage == 1 else ("each micro-batch", micro_batches)
        # Once a step is after the last of several backward passes: little of it is hidden.
        beside: Beside = "backward" if overlaps and not plain and times == micro_batches else None
        return [
            Collective(f"gradients, {how_often}", kind, times * each, beside),
            Collective("weights, after the update", "all-gather", weights, None),
        ]
    found = gathered(model, recomputed, thresholds(training))
    elements = micro_batches * found.per_micro_batch + found.per_step
    overlaps = overlaps is not False
    kind = "reduce-scatter" if scattered else "all-reduce"
    return [
        Collective("gradients, each micro-batch", kind, micro_batches * each, "backward" if overlaps else None),
        Collective(
            "weights, as they are needed",
            "all-gather",
            elements * BYTES[precision],
            "computation" if overlaps else None,
        ),
    ]


def of_discriminator(discriminator: nn.Module | None, training: TrainingConfig, ranks: int) -> list[Collective]:
    """Of a step, on average. DDP sends them beside the last of the discriminator's backward passes, which are too short
    to count on."""
    if discriminator is None or ranks == 1:
        return []
    trained = sum(p.numel() for p in discriminator.parameters() if p.requires_grad)
    every = training.discriminator.every
    return [Collective("the discriminator's gradients", "all-reduce", 4 * trained / every, None)]
