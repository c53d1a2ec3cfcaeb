"""Shard sets → batches, deterministic and elastic.

1. ``order`` says which sample is global sample n: a function of the seed and the set alone.
2. Rank r of R takes the samples n = consumed + r, consumed + r + R, …; its DataLoader workers take these in turn.
3. A worker reads the windows its samples stand in (``windows``) and decodes them (``formats``) one by one; a worker
   that dies or hangs is replaced (``workers``).
4. The main process stacks samples into batches and counts the unreadable ones.
5. Where several sets are mixed, each has workers of its own, and every step draws from one of them (``mixture``).

So the state to resume is one integer per set, the samples of it that all ranks together have consumed, and it may be
resumed with other numbers of ranks and workers and other batch sizes. A worker holds one window of encoded bytes per
virtual stream that it owns: in all processes together V x the size of a window.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from data_pipeline.config import (
    MAIN,
    ClipDataConfig,
    ClipSetConfig,
    LatentDataConfig,
    LatentSetConfig,
    Location,
    StreamConfig,
)
from data_pipeline.errors import UsageError, UserError
from data_pipeline.formats import Clips, Latents
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import chosen
from data_pipeline.order import FileOrder, Order, Share, check_buffer, shares, stream_count
from data_pipeline.shard_set import ShardSet, read_set
from data_pipeline.windows import Format, WindowReader
from data_pipeline.workers import At, Item, Read, items

log = logging.getLogger(__name__)

Batch = dict[str, Any]

_Member = ClipSetConfig | LatentSetConfig
FEWEST_READ = 20  # samples read before the share of unreadable ones means anything


class TrainingBatches:
    """This rank's training batches, without end.

    ``consumed`` is the position, to be saved and given back: for each set the samples of it that all ranks together
    have drawn. What workers have prefetched does not count. ``replaced`` of this rank's were, because they could not be
    read.
    """

    def __init__(
        self, sets: Mapping[str, tuple["_Set", _Member]], seed: int, share: Share, consumed: Mapping[str, int]
    ):
        self._seed, self._share = seed, share
        self._weights = {name: member.weight for name, (_, member) in sets.items()}
        self.consumed = {name: consumed.get(name, 0) for name in sets}
        self._health = [opened.health for opened, _ in sets.values()]
        self._batches = {
            name: opened.training_batches(name, member.virtual_streams, seed, share, self.consumed[name])
            for name, (opened, member) in sets.items()
        }

    @property
    def replaced(self) -> int:
        return sum(health.bad for health in self._health)

    def draw(self, step: int, count: int = 1) -> list[Batch]:
        """The ``count`` micro-batches of training step ``step``, all from one set."""
        name = chosen(self._weights, self._seed, step)
        batches = list(islice(self._batches[name], count))
        self.consumed[name] += count * self._share.batch_size * self._share.world_size
        return batches

    def close(self) -> None:
        """Ends the workers."""
        for batches in self._batches.values():
            batches.close()


def clip_batches(
    config: ClipDataConfig,
    split: str,
    *,
    seed: int,
    share: Share,
    consumed: Mapping[str, int] | None = None,
    quarantined: dict[str, str] | None = None,
) -> TrainingBatches:
    """Training batches of clips: clip uint8 (b, t, h, w, c) (float32 where the arrays are), label int64 (b,),
    key list[str].

    ``quarantined`` (key → reason) names samples that stopped a worker, and gains those that do so now.
    UsageError if there is no such shard set or the ranks cannot share it; UserError, while drawing, if more than
    ``max_bad_fraction`` is unreadable.
    """
    main = ClipSetConfig(**{name: getattr(config, name) for name in ClipSetConfig.model_fields})
    sets = {}
    for name, member in {MAIN: main, **config.mix}.items():
        opened = _open(config, member.shards, split, "clips", partial(Clips, member.clip, seed), quarantined)
        sets[name] = opened, member
    return TrainingBatches(sets, seed, share, consumed or {})


def latent_batches(
    config: LatentDataConfig,
    split: str,
    *,
    seed: int,
    share: Share,
    consumed: Mapping[str, int] | None = None,
    quarantined: dict[str, str] | None = None,
) -> TrainingBatches:
    """Like ``clip_batches``, of latents: latent int64 (b, T', H', W') or bfloat16 (b, C, T', H', W')."""
    main = LatentSetConfig(**{name: getattr(config, name) for name in LatentSetConfig.model_fields})
    sets = {}
    for name, member in {MAIN: main, **config.mix}.items():
        sets[name] = _open(config, member.latents, split, "latents", Latents, quarantined), member
    return TrainingBatches(sets, seed, share, consumed or {})


def clip_evaluation_batches(
    config: ClipDataConfig,
    split: str,
    *,
    seed: int,
    share: Share,
    samples: Sequence[int] | None = None,
    epoch: int = 0,
    quarantined: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """The samples numbered ``samples`` (those there are) of ``config.shards``, or all, each exactly once over the
    ranks; every rank gets the same number of batches of ``share.batch_size``.

    Besides what ``clip_batches`` gives: index int64 (b,), the sample's number in the manifest's order, and weight
    float32 (b,), 0 for what only fills up a batch and for unreadable samples. Another ``epoch`` cuts other clips
    where starts are random. Raises like ``clip_batches``.
    """
    opened = _open(config, config.shards, split, "clips", partial(Clips, config.clip, seed), quarantined)
    return opened.evaluation_batches(share, samples, epoch)


def latent_evaluation_batches(
    config: LatentDataConfig,
    split: str,
    *,
    share: Share,
    samples: Sequence[int] | None = None,
    quarantined: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """Like ``clip_evaluation_batches``, of a latent set."""
    opened = _open(config, config.latents, split, "latents", Latents, quarantined)
    return opened.evaluation_batches(share, samples, 0)


def _open(
    config: StreamConfig,
    location: Location,
    split: str,
    kind: str,
    format_of: Callable[[Manifest], Format],
    quarantined: dict[str, str] | None,
) -> "_Set":
    shards = read_set(location, split)
    if shards.manifest.kind != kind:
        raise UsageError(f"{shards.where}: holds {shards.manifest.kind}, {kind} are needed")
    return _Set(config, shards, format_of(shards.manifest), {} if quarantined is None else quarantined)


class _Set:
    """A shard set, opened: what clips and latents have in common."""

    def __init__(self, config: StreamConfig, shards: ShardSet, format: Format, quarantined: dict[str, str]):
        self._config, self._set, self._format, self._quarantined = config, shards, format, quarantined
        self.health = _Health(shards.where, config.max_bad_fraction)
        self._counts = [[n * format.per_count for n in shard.window_samples] for shard in shards.manifest.shards]

    def training_batches(
        self, name: str, wanted: int | None, seed: int, share: Share, consumed: int
    ) -> Iterator[Batch]:
        config, where, shards = self._config, self._set.where, self._set.manifest.shards
        key = "data" if name == MAIN else f"data.mix.{name}"
        streams = stream_count(len(shards), wanted, share.world_size, config.workers, where, key)
        largest = max(size for shard in shards for size in shard.window_bytes)
        check_buffer(streams, largest, config.buffer_bytes, share.world_size, config.workers, where, key)
        order = Order(self._counts, streams, seed)

        def read(worker: int, workers: int, received: int, at: At) -> Iterator[Item]:
            reader = WindowReader(self._set, self._format, at, self._quarantined, self._config.cache)
            gone = consumed + share.world_size * received
            for stream, slot in order.samples(gone, share.rank + share.world_size * worker, share.world_size * workers):
                reading = reader.read(slot, stream)
                yield reading.sample, reading.unreadable

        return self._batches(read, share.batch_size)

    def evaluation_batches(self, share: Share, samples: Sequence[int] | None, epoch: int) -> Iterator[Batch]:
        order = FileOrder(self._counts)
        wanted = range(order.samples) if samples is None else [number for number in samples if number < order.samples]
        mine = shares(wanted, share)

        def read(worker: int, workers: int, received: int, at: At) -> Iterator[Item]:
            reader = WindowReader(self._set, self._format, at, self._quarantined, self._config.cache)
            for index, counts in mine[received + worker :: workers]:
                reading = reader.read(order.slot(index, epoch))
                weight = float(counts and not reading.unreadable)
                yield {**reading.sample, "index": index, "weight": weight}, reading.unreadable

        return self._batches(read, share.batch_size)

    def _batches(self, read: Read, batch_size: int) -> Iterator[Batch]:
        """Samples from the workers, in their order, as batches; counts and logs what is unreadable."""
        config = self._config
        readings = items(
            read,
            workers=config.workers,
            timeout_s=config.timeout_s,
            held=batch_size,
            array_bytes=self._format.array_bytes,
            quarantined=self._quarantined,
            where=self._set.where,
        )
        with closing(readings):
            while batch := list(islice(readings, batch_size)):
                yield self._format.finish(_collate([self.health.checked(item) for item in batch]))


class _Health:
    """Counts unreadable samples, logs each once, and fails the job when there are too many."""

    def __init__(self, where: str, most: float):
        self._where, self._most = where, most
        self._read = self.bad = 0
        self._known: set[str] = set()

    def checked(self, item: Item) -> Batch:
        sample, unreadable = item
        self._read += 1
        self.bad += bool(unreadable)
        for name, reason in unreadable.items():
            if name not in self._known:
                self._known.add(name)
                log.warning("%s: %s cannot be read and was replaced: %s", self._where, name, reason)
        if self._read >= FEWEST_READ and self.bad > self._most * self._read:
            raise UserError(
                f"{self._where}: {self.bad} of {self._read} samples could not be read, more than max_bad_fraction "
                f"{self._most:g}; the log names them, `stpredict inspect --verify` checks the shards"
            )
        return sample


def _collate(samples: list[Batch]) -> Batch:
    """Arrays are stacked into tensors, numbers become tensors, strings a list.

    numpy stacks: it copies in one thread, where torch.stack wakes a thread pool and waits for all of it (39 ms
    instead of 1 for 8 clips of 17x64x64 on a machine with other work).
    """
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        else:
            batch[name] = values if isinstance(first, str) else torch.tensor(values)
    return batch
