"""What DeepSpeed 0.19 keeps of gradients on a rank, and through what it exchanges them, from moment to moment.

Read in its source (runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py, engine.py), held to what tensors take
by benchmarks/estimates.py. Gradients are made in the type of the weights (``low``) and added up in another (``sums``).
They go through a bucket: when the next does not fit any more, and when all are there, it is reduced, for which it is
copied as a whole.

| ZeRO            | kept                                   | bucket                               | copies of it     |
|-----------------|----------------------------------------|--------------------------------------|------------------|
| 0               | all                                    | none                                 | one, after all   |
| 1, bf16 to fp32 | all, twice: ``low`` and ``sums``       | none                                 | one, after all   |
| 1               | all                                    | ``sums``, from the first to the last | one, after all   |
| 2               | a share, from the first full bucket on | ``low``, from the first to the last  | ``low``, ``sums``|
| 3               | a share, always                        | ``sums``, always                     | one              |
"""

from typing import NamedTuple

import numpy as np

from stpredict.estimates.planned import Planned
from stpredict.training.config import TrainingConfig
from stpredict.training.precision import BYTES

# DeepSpeed's defaults, in elements.
BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
REDUCED_AT_ONCE = 500_000_000  # by the engine itself: ZeRO-0, and ZeRO-1 in bf16


class Kept(NamedTuple):
    """Bytes, of one moment or of several."""

    gradients: np.ndarray | float
    buckets: np.ndarray | float


class Gradients:
    """Of one training: ``accumulated``, if a step has several micro-batches, of whose last all this is."""

    def __init__(
        self, planned: Planned, training: TrainingConfig, precision: str, ranks: int, accumulated: bool, device: str
    ):
        trained = [p for p in planned.task.model.parameters() if p.requires_grad]
        self.stage, self.ranks, self.accumulated = training.zero_stage, ranks, accumulated
        self.all = sum(p.numel() for p in trained)
        self.share = -(-self.all // ranks)
        self.largest = max(p.numel() for p in trained)
        self.matrices = [p.numel() for p in trained if p.ndim >= 2]  # which decay: a group of its own
        self.decayed = sum(self.matrices)
        self.low = 4 if self.stage == 0 else BYTES[precision]
        self.sums = BYTES[training.accumulation_dtype]
        self.offloaded = training.offload.optimizer == "cpu"
        self.optimizer, self.device = training.optimizer, device
        # DeepSpeed's optimizer for it is another than ZeRO's.
        self.is_bf16_optimizer = (self.stage, precision, self.sums, self.offloaded) == (1, "bf16", 4, False)
        # ZeRO 1 and 2 add up in one tensor for a rank's share.
        self.in_one = self.sums == 4 and self.low != 4
        settings = training.deepspeed.get("zero_optimization", {})
        self.bucket = int(settings.get("reduce_bucket_size", BUCKET))
        self.sub_group = int(settings.get("sub_group_size", SUB_GROUP))
        self.overlaps = bool(settings.get("overlap_comm")) and self.stage in (1, 2)
        self.scatters = settings.get("reduce_scatter", True)
        self.to_owners = self.scatters and not settings.get("use_multi_rank_bucket_allreduce", True)

    def before_forward(self) -> Kept:
        kept = 0
        if self.is_bf16_optimizer:
            kept = (self.sums + self.low * self.accumulated) * self.all
        elif self.stage == 3:
            return Kept(self._on_device(self.sums * self.share), self.sums * self.bucket)
        elif self.accumulated:
            kept = self._between()
        return Kept(kept, 0)

    def in_backward(self, finished: np.ndarray) -> Kept:
        """At every moment, by the elements whose gradients are ``finished``."""
        so_far = np.full_like(finished, self.all) if self.accumulated else finished
        if self.stage == 0:
            return Kept(self.sums * so_far, 0)
        if self.is_bf16_optimizer:
            return Kept(self.sums * self.all + self.low * so_far, 0)
        if self.stage == 1:
            return Kept(self.sums * so_far, self._buffers(self.sums) * (finished > 0))
        reduced, too_large = self._reduced(finished)
        copies = np.array([self._copies(int(elements)) for elements in reduced])
        if self.stage == 3:
            kept = np.full_like(finished, self._on_device(self.sums * self.share))
            return Kept(kept + self.low * too_large, self.sums * self.bucket + copies)
        begun = np.cumsum(reduced) > 0
        kept = self.low * too_large + self._between() * self.accumulated
        if self.in_one:
            kept += self.sums * self.share * begun * (not self.accumulated)
        elif not self.offloaded:
            # Made when what is reduced first is reduced.
            kept += self.low * self.share * (begun & (np.cumsum(reduced) > reduced))
        return Kept(kept, self._buffers(self.low) * (finished > 0) + copies)

    def exchanged(self, finished: np.ndarray) -> list[Kept]:
        """After the backward pass: when the last of them are reduced, and when they have been."""
        left = self._left(finished)
        if self.stage == 0 or self.is_bf16_optimizer:
            kept = (self.sums + self.low * self.is_bf16_optimizer) * self.all
            return [Kept(kept, self._reduced_by_the_engine())]
        if self.stage == 1:
            kept, share = self.sums * self.all, self.sums * self.share
            first = min(self.bucket, self.all)
            if self.in_one:
                beside = share
            elif self.offloaded:
                beside = 0
            else:  # made when the first bucket is reduced, and gone its gradients
                beside = max(0, share - self.sums * first) if first < self.all else 0
            return [Kept(kept + beside + self._norms() * self.offloaded, self._buffers(self.sums))]
        if self.stage == 3:
            return [Kept(self._on_device(self.sums * self.share), self.sums * self.bucket + self._copies(left))]
        kept = self._between() * self.accumulated
        if self.in_one:
            kept = self.sums * self.share
            return [Kept(kept, self._buffers(self.low) + self._copies(left))]
        share = 0 if self.offloaded else self.low * self.share
        before = share if left < self.all else 0
        return [
            Kept(kept + before, self._buffers(self.low) + self._copies(left)),
            Kept(kept + share, self._buffers(self.low)),
        ]

    def between(self) -> Kept:
        """When they have been exchanged, and before the update."""
        if self.stage == 0:
            return Kept(4 * self.all, 0)
        if self.is_bf16_optimizer:
            return Kept((self.sums + self.low) * self.all, 0)
        kept, bucket = self.sums * self.share, self.sums * self.bucket * (self.stage == 3)
        if self.stage == 1 and self.in_one:
            bucket = self._buffers(self.sums)  # the other ranks' gradients are views of it
        if self.offloaded and not (self.in_one and self.stage < 3):
            kept = 0
        return Kept(kept, bucket)

    def in_update(self) -> list[Kept]:
        """When their norm is taken, and when the weights are updated."""
        kept, bucket = self.between()
        # torch's SGD adds the decay to a copy.
        decays = self.optimizer.kind == "sgd" and self.optimizer.weight_decay > 0
        if self.stage == 0:
            copied = self.decayed if self.device == "cuda" else self.largest
            return [Kept(kept + 4 * copied * decays, 0)]
        if self.is_bf16_optimizer:
            return [Kept(kept + 4 * self._of_share(self.decayed) * decays, 0)]
        if self.offloaded:
            return [Kept(kept, bucket)]
        group = self._of_share(self.decayed)
        if self.stage == 3:
            group = self._largest_sub_group()
        if self.in_one and self.stage < 3:
            flat = stepping = 0
        else:  # put together, and then in fp32
            stepping = 4 * group
            flat = stepping if self.sums == 4 else stepping + self.sums * group
        return [Kept(kept + self._norms(), bucket), Kept(kept + max(flat, stepping + 4 * group * decays), bucket)]

    def _norms(self) -> int:
        """While the norm is taken: in fp64, tensor by tensor."""
        return 8 * (min(self.largest, self.share) if self.stage < 3 else -(-self.largest // self.ranks))

    def _between(self) -> float:
        """Between micro-batches of a step."""
        if self.stage == 2:
            return self.sums * self.share if self.in_one or not self.offloaded else 0
        return self.sums * self.all

    def _on_device(self, size: float) -> float:
        """ZeRO-3's gradients are where its optimizer is."""
        return 0 if self.offloaded else size

    def _of_share(self, elements: int) -> int:
        return -(-elements // self.ranks)

    def _largest_sub_group(self) -> int:
        """ZeRO-3 updates so many elements at once: a sub-group ends with the tensor that makes it large enough."""
        largest = held = 0
        for elements in map(self._of_share, self.matrices):
            held += elements
            largest = max(largest, held)
            if held >= self.sub_group:
                held = 0
        return largest

    def _buffers(self, width: int) -> int:
        return (2 if self.overlaps else 1) * width * self.bucket

    def _reduced(self, finished: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Elements that are reduced at each moment, because the next do not fit into the bucket; and those of a tensor
        that is larger than the bucket, which waits outside."""
        reduced, outside = np.zeros_like(finished), np.zeros_like(finished)
        held = 0
        for at in np.flatnonzero(np.diff(finished, prepend=0)):
            new = finished[at] - (finished[at - 1] if at else 0)
            if held and held + new > self.bucket:
                reduced[at], held = held, 0
            held += new
            outside[at:] = held if held > self.bucket else 0
        return reduced, outside

    def _left(self, finished: np.ndarray) -> int:
        """What the last bucket has."""
        return int(finished[-1] - self._reduced(finished)[0].sum())

    def _copies(self, elements: int) -> float:
        """Bytes, while a bucket with so many is reduced."""
        if self.stage == 3:
            # gloo, over which ranks without GPUs talk, makes copies of its own.
            of_gloo = 1 + 1 / self.ranks if self.device == "cpu" and self.ranks > 1 and self.scatters else 0
            return self.sums * elements * (1 + of_gloo)
        if self.to_owners:
            elements = min(elements, self.share)
        converted = self.sums * elements if self.sums != self.low else 0
        copied = converted + (self.low * elements if self.scatters else 0)
        return max(copied, self._norms() if elements and self.offloaded else 0)

    def _reduced_by_the_engine(self) -> float:
        """A copy of what is reduced at once. A tensor alone needs none: ZeRO-1 in bf16 has two, for weights that decay
        and those that do not."""
        if self.is_bf16_optimizer and self.decayed > REDUCED_AT_ONCE:
            return 0
        return self.sums * min(self.all, REDUCED_AT_ONCE + self.largest)
