"""Memory of a training, by what it is for: on each device, and what is kept in the host's memory instead.

A step has its most in the backward pass, or when it updates: the larger of the two is given, with its parts as they are
then. What DeepSpeed keeps at which stage is docs/training.md's table, which was measured.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from stpredict.estimates.activations import Activations, Numbers, follow
from stpredict.estimates.planned import Planned
from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import deepspeed_config
from stpredict.training.precision import TYPES

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that has most, at ``moment``: "backward" or "update".

    ``weights`` are those that are computed with, ``masters`` the fp32 ones that are updated. ``buffers`` are the
    model's, ``buckets`` those through which DeepSpeed exchanges gradients and weights, whose size does not depend on
    the model's; ``gathered`` is what ZeRO-3 has collected of the other ranks' weights. ``activations`` are a
    micro-batch's, with its gradients on their way, losses and inputs. ``host`` is what offloading keeps in the host's
    memory, for this rank: it is not part of ``total``.
    """

    moment: str
    weights: int
    masters: int
    moments: int
    gradients: int
    averages: int
    buffers: int
    buckets: int
    gathered: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """On the device, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("moment", "host")}


class MemoryEstimator:
    """Of one planned training under any of the settings that do not change what it learns. The first of those that
    compute in other numbers or keep other activations takes seconds, the others nothing.

    ``device``, cuda or cpu: which kernels there are, and what precision ``auto`` is (bf16 on cuda, fp32 on cpu).
    ValueError for a training with a discriminator.
    """

    def __init__(self, planned: Planned, device: str = "cuda"):
        if planned.task.discriminator is not None:
            raise ValueError("the memory of a discriminator is not estimated")
        self.planned, self.device = planned, device
        self._activations: dict[tuple, Activations] = {}

    def of(self, training: TrainingConfig, ranks: int, micro_batch: int) -> Memory:
        """``training`` decides but for its batch sizes, on so many ranks."""
        precision = self._precision(training)
        activations = self._follow(training, precision)
        backward = self._states(training, precision, ranks)
        return max(
            (self._in_backward(backward, training, precision, ranks, activations, micro_batch)),
            (self._in_update(backward, training, precision, ranks, activations, micro_batch)),
            key=lambda memory: memory.total,
        )

    def _precision(self, training: TrainingConfig) -> str:
        if training.precision == "auto":
            return "bf16" if self.device == "cuda" else "fp32"
        return training.precision

    def _follow(self, training: TrainingConfig, precision: str) -> Activations:
        dtype = TYPES[precision]
        low = dtype if precision != "fp32" else None
        numbers = Numbers(torch.float32, low) if training.zero_stage == 0 else Numbers(dtype)
        policy = training.activation_checkpointing
        key = (numbers, policy.policy, policy.every)
        if key not in self._activations:
            self._activations[key] = follow(self.planned, policy, numbers, self.device)
        return self._activations[key]

    def _states(self, training: TrainingConfig, precision: str, ranks: int) -> Memory:
        """What is there all the time."""
        trained, frozen = self._elements()
        stage, share = training.zero_stage, -(-trained // ranks)
        width = 4 if stage == 0 else BYTES[precision]
        weights = width * ((trained + frozen) if stage < 3 else -(-(trained + frozen) // ranks))
        mine = trained if stage == 0 else share
        masters = 0 if stage == 0 else 4 * mine
        moments = 0 if training.optimizer.kind == "sgd" else 8 * mine
        host = 0
        if training.offload.optimizer == "cpu":
            host, masters, moments = masters + moments, 0, 0
        if training.offload.parameters == "cpu":
            host, weights = host + weights, 0
        return Memory(
            moment="",
            weights=weights,
            masters=masters,
            moments=moments,
            gradients=0,
            averages=4 * share if training.ema_decay is not None else 0,
            buffers=sum(b.nbytes for b in self.planned.task.model.buffers()),
            buckets=0,
            gathered=0,
            activations=0,
            host=host,
        )

    def _in_backward(
        self,
        states: Memory,
        training: TrainingConfig,
        precision: str,
        ranks: int,
        activations: Activations,
        micro_batch: int,
    ) -> Memory:
        trained, frozen = self._elements()
        stage, share = training.zero_stage, -(-trained // ranks)
        added, low = BYTES[training.accumulation_dtype], BYTES[precision]
        settings = deepspeed_config(training, TYPES[precision], 1, 1)["zero_optimization"]
        bucket = int(settings.get("reduce_bucket_size", 5e8)) * added
        alive, gathered, buckets = activations.bytes(micro_batch), 0, 0
        match stage:
            case 0:
                gradients = 4 * activations.finished
            case 1 if precision == "bf16":
                gradients = added * trained + low * activations.finished
            case 1:
                gradients, buckets = added * activations.finished, bucket
            case 2:
                gradients, buckets = added * activations.finished / ranks, bucket
            case _:
                gradients, buckets = np.full_like(alive, added * share), bucket
                gathered = min(low * (trained + frozen), low * int(1e9))
        at = int(np.argmax(alive + gradients))
        return replace(
            states,
            moment="backward",
            gradients=int(np.broadcast_to(gradients, alive.shape)[at]),
            buckets=buckets,
            gathered=gathered,
            activations=int(alive[at]),
        )

    def _in_update(
        self,
        states: Memory,
        training: TrainingConfig,
        precision: str,
        ranks: int,
        activations: Activations,
        micro_batch: int,
    ) -> Memory:
        trained, _ = self._elements()
        added = BYTES[training.accumulation_dtype]
        gradients = added * (trained if training.zero_stage < 2 else -(-trained // ranks))
        return replace(
            states, moment="update", gradients=gradients, activations=int(activations.bytes(micro_batch)[-1])
        )

    def _elements(self) -> tuple[int, int]:
        """Of trained and of frozen parameters."""
        parameters = list(self.planned.task.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return trained, sum(p.numel() for p in parameters) - trained
