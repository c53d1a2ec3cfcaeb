"""Bytes on disk: of checkpoints, exports and cached latents."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.latents import default_clips_per_member, latent_shards
from stpredict.estimates.planned import Planned
from stpredict.training.config import OptimizerConfig, TrainingConfig
from stpredict.training.saving import random_states

# Of files of JSON, measured: tests/stpredict/estimates holds them against real ones.
ABOUT_PIECE = 67  # bytes: a piece in the header of its rank's file, beside its key
ABOUT_TENSOR = 51  # a tensor in the index, beside its key, and
ABOUT_RANGE = 16  # each of its pieces
ABOUT_CHECKPOINT = 2800  # state.json, COMPLETE, and in that
ABOUT_RANK = 263  # each rank's files
ABOUT_EXPORTED = 66  # a tensor in the header of an export, beside its name
ABOUT_EXPORT = 400  # its config
ABOUT_CLIP = 12  # name and label of a clip, compressed
ABOUT_SHARD = 2200  # the end of a tar, its record, its lines in the manifest


@dataclass(frozen=True)
class Disk:
    """Bytes of one ``checkpoint`` and of the ``export``. At most ``checkpoints`` are there at once: those that are
    kept, and the one that is being written; ``peak`` is what they take with the export."""

    checkpoint: int
    export: int
    checkpoints: int

    @property
    def peak(self) -> int:
        return self.checkpoints * self.checkpoint + self.export


@dataclass(frozen=True)
class LatentCache:
    """``per_clip`` is a clip's token ids alone, ``total`` all files of a split, with what stands around them."""

    per_clip: int
    total: int


def disk_of(planned: Planned, training: TrainingConfig, ranks: int) -> Disk:
    return Disk(_checkpoint(planned, training, ranks), _export(planned), _most_at_once(training))


def latent_cache(grid: tuple[int, int, int], codebook_size: int, clips: int, shards: int = 96) -> LatentCache:
    """Of ``clips`` clips as token ids, in ``shards`` shards or fewer, as an encode job writes them."""
    per_clip = math.prod(grid) * np.min_scalar_type(codebook_size - 1).itemsize
    shards, at_once = latent_shards(clips, shards), default_clips_per_member(per_clip)
    total = 0
    for index in range(shards):
        left = (index + 1) * clips // shards - index * clips // shards
        while left > 0:
            count = min(left, at_once)
            total += _in_tar(128 + count * per_clip) + _in_tar(80 + count * ABOUT_CLIP)
            left -= count
    return LatentCache(per_clip, total + shards * ABOUT_SHARD)


def _in_tar(size: int) -> int:
    """Of a file: its header, and filled up to a block."""
    return 512 + -(-size // 512) * 512


def _checkpoint(planned: Planned, training: TrainingConfig, ranks: int) -> int:
    averages = ["ema"] if training.ema_decay is not None else []
    kinds = [*_of_optimizer(training.optimizer), *averages]
    split = ranks if training.zero_stage == 3 else 1
    cut = (ranks - 1) * len(kinds) * 2 * (training.zero_stage in (1, 2))
    total = _module("model", planned.task.model, kinds, split) + cut * (ABOUT_PIECE + ABOUT_RANGE)
    if planned.task.discriminator is not None:  # whole on every rank, each tensor saved by one
        total += _module("discriminator", planned.task.discriminator, _of_optimizer(training.discriminator.optimizer))
    return total + ranks * (_random() + ABOUT_RANK) + ABOUT_CHECKPOINT


def _module(module: str, model: torch.nn.Module, kinds: list[str], split: int = 1) -> int:
    """Of its state. Of each parameter a tensor of every kind is saved in ``split`` pieces, a buffer as a whole."""
    total = 0
    for name, parameter in model.named_parameters():
        for kind in kinds if parameter.requires_grad else ["weight"]:
            total += 4 * parameter.numel() + _described(f"{module}/{kind}/{name}", split)
    for name, buffer in _persistent(model):
        total += buffer.nbytes + _described(f"{module}/buffer/{name}", 1)
    return total


def _described(key: str, pieces: int) -> int:
    """Of a tensor's name and place, in the headers of its pieces and in the index."""
    return len(key) * (pieces + 1) + pieces * (ABOUT_PIECE + ABOUT_RANGE) + ABOUT_TENSOR


def _of_optimizer(optimizer: OptimizerConfig) -> list[str]:
    """Kinds of what is kept of each of its weights."""
    return ["weight"] if optimizer.kind == "sgd" else ["weight", "exp_avg", "exp_avg_sq"]


def _export(planned: Planned) -> int:
    model = planned.task.model
    tensors = [(name, 4 * p.numel()) for name, p in model.named_parameters()]
    tensors += [(name, buffer.nbytes) for name, buffer in _persistent(model)]
    return sum(size + len(name) + ABOUT_EXPORTED for name, size in tensors) + ABOUT_EXPORT


def _persistent(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _random() -> int:
    """Of a rank's file of random states."""
    packed = io.BytesIO()
    torch.save(random_states(), packed)
    return len(packed.getvalue())


def _most_at_once(training: TrainingConfig) -> int:
    checkpoint, steps = training.checkpoint, training.steps
    saved = steps // checkpoint.every + bool(steps % checkpoint.every)
    kept = checkpoint.keep + (checkpoint.best.keep if checkpoint.best else 0)
    if checkpoint.keep_every:
        kept += steps // math.lcm(checkpoint.every, checkpoint.keep_every)
    return min(saved, kept + 1)
