"""Memory of a training, by what it is for: on each device, and in the host's memory.

A step has its most in the backward pass, or when it updates: the larger of the two is given, with its parts as they
are then. What DeepSpeed 0.19 keeps at which stage was read in its source; benchmarks/results/estimates.md has what
comes out beside what was measured.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from data_pipeline.errors import UsageError
from stpredict.estimates.activations import Activations, Numbers, follow
from stpredict.estimates.planned import Planned
from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import deepspeed_config
from stpredict.training.precision import TYPES

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's own defaults, in elements.
BUCKETS = {
    "reduce_bucket_size": 5e8,
    "prefetch_bucket_size": 5e7,
    "max_live_parameters": 1e9,
    "sub_group_size": 1e9,
}
REDUCED_AT_ONCE = 500_000_000  # elements: gradients of ZeRO-0 in one all-reduce


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that has most, at ``moment``: "tokenizing", "backward" or "update".

    ``weights`` are those that are computed with, ``masters`` the fp32 ones that are updated. ``buffers`` are the
    model's; ``buckets`` those through which DeepSpeed exchanges gradients, whose size does not depend on the model's;
    ``gathered`` is what ZeRO-3 has collected of the other ranks' weights. ``activations`` are a micro-batch's, with
    gradients on their way, losses and inputs. ``tokenizer`` is one that runs in every step: its weights, the clips of
    all micro-batches and, while it runs, what it makes of them. ``host`` is in the host's memory, for this rank, and no
    part of ``total``: what is offloaded, and the copy from which checkpoints are written in the background.
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
    tokenizer: int = 0
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
    UsageError for a training with a discriminator.
    """

    def __init__(self, planned: Planned, device: str = "cuda"):
        if planned.task.discriminator is not None:
            raise UsageError(
                "what a discriminator takes is not estimated yet; loss.adversarial=null estimates the training without"
            )
        self.device, self._planned = device, planned
        self._activations: dict[tuple, Activations] = {}

    def of(self, training: TrainingConfig, ranks: int, micro_batch: int) -> Memory:
        """On ``ranks`` ranks that compute ``micro_batch`` samples at once. Where ``training.batch_size`` is more than
        that, gradients are accumulated; ``training.micro_batch_size`` is not looked at."""
        precision = training.precision
        if precision == "auto":
            precision = "bf16" if self.device == "cuda" else "fp32"
        accumulated = training.batch_size > ranks * micro_batch
        kept = _Kept(self._planned, training, precision, ranks, accumulated)
        activations = self._follow(training, precision)
        moments = [kept.in_backward(activations, micro_batch), kept.in_update(activations, micro_batch)]
        if tokenizing := self._planned.tokenizing:
            clips = tokenizing.weights + training.batch_size // ranks * tokenizing.clip
            moments = [replace(moment, tokenizer=clips) for moment in moments]
            moments.append(replace(kept.before_forward(), tokenizer=clips + tokenizing.forward))
        return max(moments, key=lambda memory: memory.total)

    def _follow(self, training: TrainingConfig, precision: str) -> Activations:
        dtype = TYPES[precision]
        low = dtype if precision != "fp32" else None
        numbers = Numbers(torch.float32, low) if training.zero_stage == 0 else Numbers(dtype)
        policy = training.activation_checkpointing
        key = (numbers, policy.policy, policy.every)
        if key not in self._activations:
            self._activations[key] = follow(self._planned, policy, numbers, self.device)
        return self._activations[key]


class _Kept:
    """What a rank keeps beside activations."""

    def __init__(self, planned: Planned, training: TrainingConfig, precision: str, ranks: int, accumulated: bool):
        self.stage, self.ranks, self.accumulated = training.zero_stage, ranks, accumulated
        self.offloaded = training.offload.optimizer == "cpu"
        parameters = list(planned.task.model.parameters())
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.all = sum(p.numel() for p in parameters)
        self.share = -(-self.trained // ranks)
        self.width = 4 if self.stage == 0 else BYTES[precision]  # of a weight that is computed with
        self.added = BYTES[training.accumulation_dtype]  # of a gradient that is added up
        # DeepSpeed's optimizer for it is another than ZeRO's.
        self.is_bf16_optimizer = (self.stage, precision, self.added, self.offloaded) == (1, "bf16", 4, False)
        settings = deepspeed_config(training, TYPES[precision], 1, 1)["zero_optimization"]
        self.buckets = {
            name: int(settings.get(f"stage3_{name}", settings.get(name, size))) for name, size in BUCKETS.items()
        }
        overlaps = settings.get("overlap_comm")
        self.reduced_in = 2 if overlaps and self.stage in (1, 2) else 1  # buckets
        self.states = self._states(planned, training)

    def _states(self, planned: Planned, training: TrainingConfig) -> Memory:
        """What is there all the time."""
        mine = self.trained if self.stage == 0 else self.share
        weights = self.width * (self.all if self.stage < 3 else -(-self.all // self.ranks))
        masters = 0 if self.stage == 0 else 4 * mine
        moments = 0 if training.optimizer.kind == "sgd" else 8 * mine
        averages = 4 * self.share if training.ema_decay is not None else 0
        host = 0
        if training.checkpoint.background:
            host += 4 * self.share + moments * self.share // mine + averages
        if self.offloaded:
            host += masters + moments + averages + 4 * self.share  # and gradients
            if self.accumulated and self.stage in (1, 2):
                host += 4 * self.share  # of earlier micro-batches
            masters = moments = averages = 0
        if training.offload.parameters == "cpu":
            host, weights = host + weights, 0
        buffers = sum(buffer.nbytes for buffer in planned.task.model.buffers())
        return Memory("", weights, masters, moments, 0, averages, buffers, 0, 0, 0, host=host)

    def before_forward(self) -> Memory:
        """Of a step's last micro-batch."""
        gradients = {0: 4 * self.trained, 1: self.added * self.trained, 2: self.added * self.share}.get(self.stage, 0)
        gradients = gradients if self.accumulated else 0
        if self.is_bf16_optimizer:
            gradients = (self.added + self.width * self.accumulated) * self.trained
        buckets = 0
        if self.stage == 3:
            gradients, buckets = self.added * self.share, self.added * self.buckets["reduce_bucket_size"]
        return replace(self.states, moment="tokenizing", gradients=gradients, buckets=buckets)

    def in_backward(self, activations: Activations, micro_batch: int) -> Memory:
        alive = activations.bytes(micro_batch)
        finished = np.full_like(alive, self.trained) if self.accumulated else activations.finished
        gradients, buckets, gathered = np.zeros_like(alive), 0, 0
        bucket = self.reduced_in * self.added * self.buckets["reduce_bucket_size"]
        if self.stage == 0:
            gradients += 4 * finished
        elif self.is_bf16_optimizer:  # has room for all, and keeps the computed ones between micro-batches
            gradients += self.added * self.trained + self.width * finished
        elif self.stage in (1, 2):
            buckets = bucket
            if self.stage == 1 and not self.offloaded:
                gradients += self.added * finished
            elif not self.offloaded:
                # One tensor for all of its share, made when the first bucket is full.
                made = self.accumulated | (activations.finished > self.buckets["reduce_bucket_size"])
                gradients += self.added * self.share * made
        else:
            buckets = bucket
            gradients += self.added * self.share
            live = self.buckets["max_live_parameters"] + self.buckets["prefetch_bucket_size"]
            gathered = self.width * min(self.all, live) if self.ranks > 1 else 0
        at = int(np.argmax(alive + gradients))
        now = {"gradients": int(gradients[at]), "activations": int(alive[at])}
        return replace(self.states, moment="backward", buckets=buckets, gathered=gathered, **now)

    def in_update(self, activations: Activations, micro_batch: int) -> Memory:
        """When gradients are put together for the optimizer, or for the ranks' sum."""
        flat = 4 * self.share
        match self.stage:
            case 0:
                gradients = 4 * self.trained
                gradients += 4 * min(self.trained, REDUCED_AT_ONCE) if self.ranks > 1 else 0
            case 1 if self.is_bf16_optimizer:
                gradients = self.added * self.trained
            case 1:
                gradients = 0 if self.offloaded else self.added * self.trained + flat
            case 2:
                gradients = 0 if self.offloaded else self.added * self.share + flat
            case _:
                gradients = self.added * self.share
                gradients += 0 if self.offloaded else 4 * min(self.share, self.buckets["sub_group_size"])
        # Of the forward and backward pass, only what a step is told is left.
        rest = int(activations.bytes(micro_batch)[-1])
        buckets = self.added * self.buckets["reduce_bucket_size"] if self.stage == 3 else 0
        return replace(self.states, moment="update", gradients=gradients, buckets=buckets, activations=rest)
