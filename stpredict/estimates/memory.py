"""Memory of a training, by what it is for: on each device, and in the host's memory.

A step has its most in the backward pass, when gradients are exchanged, when weights are updated, or when a tokenizer
makes the tokens of the next micro-batch: the largest is given, with its parts as they are then. What DeepSpeed 0.19
keeps at which stage was read in its source; benchmarks/results/estimates.md has what comes out beside what was
measured.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import nn

from stpredict.estimates.activations import Activations, Numbers, follow
from stpredict.estimates.gradients import Gradients, Kept
from stpredict.estimates.planned import Planned
from stpredict.estimates.zero3_gathers import gathered, thresholds
from stpredict.training.config import TrainingConfig
from stpredict.training.precision import BYTES, TYPES


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that has most, at ``moment``: "tokenizing", "backward", "exchange", "discriminator" (its step)
    or "update".

    ``weights`` are those that are computed with, ``masters`` the fp32 ones that are updated. ``buffers`` are the
    model's; ``buckets`` those through which DeepSpeed exchanges gradients, and the copies that it makes of them;
    ``gathered`` is what ZeRO-3 has collected of the other ranks' weights. ``activations`` are a micro-batch's, with
    gradients on their way, losses and inputs. ``tokenizer`` is one that runs in every step: its weights, the clips of
    all micro-batches and, while it runs, what it makes of them. ``discriminator`` is
    one that learns, whole on every rank: weights, moments, gradients and their buckets; ``networks`` are weights that
    losses are computed with. ``host`` is in the host's memory, for this rank, and no
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
    discriminator: int = 0
    networks: int = 0
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
    """

    def __init__(self, planned: Planned, device: str = "cuda"):
        self.device, self._planned = device, planned
        self._activations: dict[tuple, Activations] = {}

    def of(self, training: TrainingConfig, ranks: int, micro_batch: int) -> Memory:
        """On ``ranks`` ranks that compute ``micro_batch`` samples at once. Where ``training.batch_size`` is more than
        that, gradients are accumulated; ``training.micro_batch_size`` is not looked at."""
        precision = training.precision
        if precision == "auto":
            precision = "bf16" if self.device == "cuda" else "fp32"
        activations = self._follow(training, precision)
        # Micro-batches before the last keep what the discriminator has yet to see.
        judged = (training.batch_size // ranks - micro_batch) * activations.judged
        alive, finished = activations.bytes(micro_batch) + judged, activations.finished
        accumulated = training.batch_size > ranks * micro_batch
        always = self._states(training, precision, ranks, accumulated)
        judge = _elements(self._planned.task.discriminator)
        states = replace(always, discriminator=always.discriminator + 4 * judge)  # gradients, until it learns again
        gradients = Gradients(self._planned, training, precision, ranks, accumulated, self.device)
        backward = _most(states, "backward", gradients.in_backward(finished), alive)
        moments = [replace(backward, gathered=self._gathered(training, precision, ranks))]
        # Of the forward and backward pass, only what a step is told is left.
        moments += [_most(states, "exchange", kept, alive[-1:]) for kept in gradients.exchanged(finished)]
        moments += [_most(states, "update", kept, alive[-1:]) for kept in gradients.in_update()]
        if learning := activations.discriminator:
            made = 4 * (np.full_like(learning.finished, judge) if accumulated else learning.finished)
            moments.append(_judges(always, gradients.between(), learning.bytes(micro_batch) + judged, made))
        if tokenizing := self._planned.tokenizing:
            clips = tokenizing.weights + training.batch_size // ranks * tokenizing.clip
            moments.append(_most(states, "tokenizing", gradients.before_forward(), np.array([tokenizing.forward])))
            moments[-1] = replace(moments[-1], activations=0, tokenizer=tokenizing.forward)
            moments = [replace(moment, tokenizer=moment.tokenizer + clips) for moment in moments]
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

    def _states(self, training: TrainingConfig, precision: str, ranks: int, accumulated: bool) -> Memory:
        """What is there all the time."""
        task, stage = self._planned.task, training.zero_stage
        model = task.model
        everything = sum(p.numel() for p in model.parameters())
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        share = -(-sum(trained) // ranks)
        mine = sum(trained) if stage == 0 else share
        width = 4 if stage == 0 else BYTES[precision]
        weights = width * (everything if stage < 3 else -(-everything // ranks))
        masters = 0 if stage == 0 else 4 * mine
        moments = 0 if training.optimizer.kind == "sgd" else 8 * mine
        averages = 4 * share if training.ema_decay is not None else 0
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        # The discriminator is in DDP, which has a place for each gradient beside it.
        judge, sgd = _elements(task.discriminator), training.discriminator.optimizer.kind == "sgd"
        discriminator = (4 + 4 + 8 * (not sgd)) * judge
        networks = sum(tensor.nbytes for n in task.networks() for tensor in (*n.parameters(), *n.buffers()))
        host = buckets = 0
        if training.checkpoint.background:
            host += 4 * share + moments * share // mine + averages + (discriminator - 4 * judge) // ranks
        if training.offload.optimizer == "cpu":
            host += masters + moments + averages + 4 * share  # and gradients
            if stage == 3:
                host += BYTES[training.accumulation_dtype] * share  # of the micro-batches so far
            else:
                # The updated weights, and a tensor's gradient on its way, which has a place on both sides.
                host, buckets = host + width * (share + max(trained)), width * max(trained)
                if accumulated and (precision == "fp32" or training.accumulation_dtype != "fp32"):
                    host += width * share
            masters = moments = averages = 0
        if training.offload.parameters == "cpu":
            host, weights = host + weights, 0
        beside = {"discriminator": discriminator, "networks": networks}
        return Memory("", weights, masters, moments, 0, averages, buffers, buckets, 0, 0, **beside, host=host)

    def _gathered(self, training: TrainingConfig, precision: str, ranks: int) -> int:
        if training.zero_stage < 3 or ranks == 1:
            return 0
        policy, task = training.activation_checkpointing, self._planned.task
        recomputed = [] if policy.policy == "none" else task.layers()[:: policy.every]
        return BYTES[precision] * gathered(task.model, recomputed, thresholds(training)).live


def _most(states: Memory, moment: str, kept: Kept, alive: np.ndarray) -> Memory:
    """Of those moments at which ``alive`` bytes of activations are there."""
    gradients, buckets = (np.broadcast_to(np.asarray(part), alive.shape) for part in kept)
    at = int(np.argmax(alive + gradients + buckets))
    return replace(
        states,
        moment=moment,
        gradients=int(gradients[at]),
        buckets=states.buckets + int(buckets[at]),
        activations=int(alive[at]),
    )


def _judges(states: Memory, kept: Kept, alive: np.ndarray, made: np.ndarray) -> Memory:
    """Of the discriminator's step, of whose own gradients ``made`` bytes are there."""
    at = int(np.argmax(alive + made))
    found = _most(states, "discriminator", kept, alive[at : at + 1])
    return replace(found, discriminator=states.discriminator + int(made[at]))


def _elements(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
