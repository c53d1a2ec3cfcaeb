"""Shard sets → batches, deterministic and elastic.

1. ``order`` says which sample is global sample n: a function of the seed and the set alone.
2. Rank r of R takes the samples n = consumed + r, consumed + r + R, …; its DataLoader workers take these in turn.
3. A worker reads the windows its samples stand in (``windows``) and decodes them (``formats``) one by one.
4. The main process stacks samples into batches and counts the unreadable ones.

So the state to resume is one integer, the samples consumed by all ranks together, and it may be resumed with other
numbers of ranks and workers and other batch sizes. A worker holds one window of encoded bytes per virtual stream
that it owns: in all processes together V x ``window_bytes``.
"""

import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.config import ClipDataConfig, LatentDataConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.formats import Clips, Latents
from data_pipeline.manifest import read_manifest
from data_pipeline.order import FileOrder, Order, shares, stream_count
from data_pipeline.storage import child
from data_pipeline.windows import Format, Reading, WindowReader

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Readings = Iterator[tuple[Reading, Batch]]  # a sample, and what the order adds to it

FEWEST_READ = 20  # samples read before the share of unreadable ones means anything


def clip_batches(
    config: ClipDataConfig,
    split: str,
    *,
    seed: int,
    rank: int,
    world_size: int,
    batch_size: int,
    consumed: int = 0,
) -> Iterator[Batch]:
    """This rank's training batches, without end: clip uint8 (b, t, h, w, c), label int64 (b,), key list[str].

    ``consumed`` counts the samples that all ranks together took before. UsageError if there is no such shard set
    or the ranks cannot share it; UserError, while iterating, if more than ``max_bad_fraction`` is unreadable.
    """
    shards = _ShardSet(config, child(config.shards, split), "clips", Clips(config.clip, seed))
    return shards.training_batches(seed, rank, world_size, batch_size, consumed)


def latent_batches(
    config: LatentDataConfig,
    split: str,
    *,
    seed: int,
    rank: int,
    world_size: int,
    batch_size: int,
    consumed: int = 0,
) -> Iterator[Batch]:
    """Like ``clip_batches``, of a latent set: latent int64 (b, T', H', W'), label int64 (b,), key list[str]."""
    shards = _ShardSet(config, child(config.latents, split), "latents", Latents())
    return shards.training_batches(seed, rank, world_size, batch_size, consumed)


def clip_evaluation_batches(
    config: ClipDataConfig,
    split: str,
    *,
    seed: int,
    rank: int,
    world_size: int,
    batch_size: int,
    limit: int | None = None,
    epoch: int = 0,
) -> Iterator[Batch]:
    """The first ``limit`` samples, or all, each exactly once over the ranks; every rank gets the same number of
    batches of ``batch_size``.

    Besides what ``clip_batches`` gives: index int64 (b,), the sample's number in the manifest's order, and weight
    float32 (b,), 0 for what only fills up a batch and for unreadable samples. Another ``epoch`` cuts other clips
    where starts are random. Raises like ``clip_batches``.
    """
    shards = _ShardSet(config, child(config.shards, split), "clips", Clips(config.clip, seed))
    return shards.evaluation_batches(rank, world_size, batch_size, limit, epoch)


def latent_evaluation_batches(
    config: LatentDataConfig,
    split: str,
    *,
    seed: int,
    rank: int,
    world_size: int,
    batch_size: int,
    limit: int | None = None,
    epoch: int = 0,
) -> Iterator[Batch]:
    """Like ``clip_evaluation_batches``, of a latent set, in which nothing depends on ``seed`` or ``epoch``."""
    shards = _ShardSet(config, child(config.latents, split), "latents", Latents())
    return shards.evaluation_batches(rank, world_size, batch_size, limit, epoch)


class _ShardSet:
    """A shard set, opened: what clips and latents have in common."""

    def __init__(self, config: ClipDataConfig | LatentDataConfig, folder: str, kind: str, format: Format):
        self._config, self._folder, self._format = config, folder, format
        self._manifest = read_manifest(folder)
        if self._manifest.kind != kind:
            raise UsageError(f"{folder}: holds {self._manifest.kind}, {kind} are needed")
        self._counts = [shard.window_samples for shard in self._manifest.shards]

    def training_batches(
        self, seed: int, rank: int, world_size: int, batch_size: int, consumed: int
    ) -> Iterator[Batch]:
        shards, wanted, workers = len(self._counts), self._config.virtual_streams, self._config.workers
        order = Order(self._counts, stream_count(shards, wanted, world_size, workers, str(self._folder)), seed)

        def read(worker: int, workers: int) -> Readings:
            reader = WindowReader(self._folder, self._manifest, self._format)
            for stream, slot in order.samples(consumed, rank + world_size * worker, world_size * workers):
                yield reader.read(slot, stream), {}

        return self._batches(read, batch_size)

    def evaluation_batches(
        self, rank: int, world_size: int, batch_size: int, limit: int | None, epoch: int
    ) -> Iterator[Batch]:
        order, samples = FileOrder(self._counts), self._manifest.samples
        mine = shares(samples if limit is None else min(limit, samples), batch_size, rank, world_size)

        def read(worker: int, workers: int) -> Readings:
            reader = WindowReader(self._folder, self._manifest, self._format)
            for index, counts in mine[worker::workers]:
                reading = reader.read(order.slot(index, epoch))
                yield reading, {"index": index, "weight": float(counts and not reading.unreadable)}

        return self._batches(read, batch_size)

    def _batches(self, read: Callable[[int, int], Readings], batch_size: int) -> Iterator[Batch]:
        """Samples from the workers, in their order, as batches; counts and logs what is unreadable."""
        workers = self._config.workers
        loader = DataLoader(
            _Samples(read),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_outlast_stop_signals if workers else None,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=max(2, math.ceil(2 * batch_size / workers)) if workers else None,
            generator=torch.Generator(),  # of its own: loading data must not move the training's random state
        )
        health = _Health(self._folder, self._config.max_bad_fraction)
        readings = iter(loader)
        try:
            while batch := list(islice(readings, batch_size)):
                yield _collate([health.checked(item) for item in batch])
        finally:
            del readings  # ends the workers now: left to the garbage collector, after an error, that can take 5 s


class _Samples(IterableDataset):
    """What one worker reads. A UserError travels as an item: raised in a worker it would lose its one line."""

    def __init__(self, read: Callable[[int, int], Readings]):
        self._read = read

    def __iter__(self) -> Iterator[tuple[Reading, Batch] | UserError]:
        worker = get_worker_info()
        try:
            yield from self._read(worker.id, worker.num_workers) if worker else self._read(0, 1)
        except UserError as error:
            yield error


class _Health:
    """Counts unreadable samples, logs each once, and fails the job when there are too many."""

    def __init__(self, folder: str, most: float):
        self._folder, self._most = folder, most
        self._read = self._bad = 0
        self._known: set[str] = set()

    def checked(self, item: tuple[Reading, Batch] | UserError) -> Batch:
        if isinstance(item, UserError):
            raise item
        reading, extra = item
        self._read += 1
        self._bad += bool(reading.unreadable)
        for name, reason in reading.unreadable.items():
            if name not in self._known:
                self._known.add(name)
                log.warning("%s: %s cannot be read and was replaced: %s", self._folder, name, reason)
        if self._read >= FEWEST_READ and self._bad > self._most * self._read:
            raise UserError(
                f"{self._folder}: {self._bad} of {self._read} samples could not be read, more than max_bad_fraction "
                f"{self._most:g}; the log names them, `stpredict inspect --verify` checks the shards"
            )
        return reading.sample | extra


def _collate(samples: list[Batch]) -> Batch:
    """Tensors are stacked, numbers become tensors, strings a list.

    numpy stacks: it copies in one thread, where torch.stack wakes a thread pool and waits for all of it (39 ms
    instead of 1 for 8 clips of 17x64x64 on a machine with other work).
    """
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.from_numpy(np.stack([value.numpy() for value in values]))
        else:
            batch[name] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def _as_is(item: Any) -> Any:
    return item


def _outlast_stop_signals(_worker: int) -> None:
    """Keeps a worker alive through a stop signal to the whole process group (a SLURM step's, systemd's, a terminal's):
    the main process saves first, which it cannot once a worker is dead.

    A SIGTERM from the main process still ends the worker: so torch ends one that is stuck, and Python, when it exits,
    those left. A worker whose main process died ends by torch's watchdog.
    """
    for number in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # sigwaitinfo, which tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
