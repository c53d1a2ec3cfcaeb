"""The order in which samples are read: arithmetic alone, no files. Torch-free.

An epoch's shard order is a permutation by (seed, epoch). The epochs' orders, one after another, are dealt round robin
to V virtual streams: the deal of an epoch goes on where the last one ended, so that every stream gets its fair share
where V does not divide the shards. A stream reads its shards one after another, each window in an order by (seed,
epoch, shard, window), and rolls into the next epoch without waiting for other streams. **Global sample n is number n
div V of virtual stream n mod V**, so the order depends on (seed, V) and on neither ranks, workers nor batch sizes;
and it can be entered at any n without reading what came before.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.seeding import generator


class Share(NamedTuple):
    """Which part of every batch a process reads: ``batch_size`` samples as rank ``rank`` of ``world_size``."""

    rank: int
    world_size: int
    batch_size: int


class Slot(NamedTuple):
    """Where a sample stands: number ``position`` of a window, in the order of the file, read in ``epoch``."""

    epoch: int
    shard: int
    window: int
    position: int


class Order:
    """``counts[shard][window]`` samples, read through ``streams`` virtual streams."""

    def __init__(self, counts: Sequence[Sequence[int]], streams: int, seed: int):
        self.streams = streams
        self._counts, self._seed = counts, seed
        self._totals = np.array([sum(windows) for windows in counts])
        self._shards = lru_cache(maxsize=4)(self._permutation)  # neighbouring streams are in the same few epochs

    def samples(self, consumed: int, reader: int = 0, readers: int = 1) -> Iterator[tuple[int, Slot]]:
        """Every ``readers``-th global sample from ``consumed + reader`` on, each with its virtual stream.

        ``streams`` must be a multiple of ``readers``: then no two readers share a stream.
        """
        epochs, skips = self._entries(consumed)
        opened: dict[int, Iterator[Slot]] = {}
        for number in count(consumed + reader, readers):
            stream = number % self.streams
            if stream not in opened:
                opened[stream] = self._stream(stream, int(epochs[stream]), int(skips[stream]))
            yield stream, next(opened[stream])

    def _entries(self, consumed: int) -> tuple[np.ndarray, np.ndarray]:
        """For every stream, when ``consumed`` samples are gone: the epoch it is in, and its samples of it that are
        gone. One permutation of the shards for each epoch that has begun; nothing is read."""
        skips = (consumed + self.streams - 1 - np.arange(self.streams)) // self.streams
        epochs = np.zeros_like(skips)
        behind = np.ones_like(skips, dtype=bool)  # streams whose epoch is not found yet
        for epoch in count():
            streams = (epoch * len(self._totals) + np.arange(len(self._totals))) % self.streams
            in_epoch = np.bincount(streams, self._totals[self._shards(epoch)]).astype(int)
            behind &= skips >= in_epoch
            if not behind.any():
                return epochs, skips
            skips[behind] -= in_epoch[behind]
            epochs[behind] += 1

    def _stream(self, stream: int, epoch: int, skip: int) -> Iterator[Slot]:
        """The samples of one virtual stream, for ever, but for the first ``skip`` of its ``epoch``."""
        for number in count(epoch):
            first = (stream - number * len(self._totals)) % self.streams
            for shard in self._shards(number)[first :: self.streams].tolist():
                if skip >= self._totals[shard]:
                    skip -= self._totals[shard]
                    continue
                for window, samples in enumerate(self._counts[shard]):
                    if skip >= samples:
                        skip -= samples
                        continue
                    order = generator("window", self._seed, number, shard, window).permutation(samples)
                    for position in order[skip:].tolist():
                        yield Slot(number, shard, window, position)
                    skip = 0

    def _permutation(self, epoch: int) -> np.ndarray:
        return generator("shards", self._seed, epoch).permutation(len(self._totals))


class FileOrder:
    """Samples as they stand in the manifest, each once: the order of evaluation."""

    def __init__(self, counts: Sequence[Sequence[int]]):
        self.samples = sum(map(sum, counts))
        self._windows = [(shard, window) for shard, windows in enumerate(counts) for window in range(len(windows))]
        self._ends = np.cumsum([samples for windows in counts for samples in windows])

    def slot(self, index: int, epoch: int) -> Slot:
        """Where sample number ``index`` of the set stands."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return Slot(epoch, *self._windows[number], index - start)


def shares(samples: Sequence[int], share: Share) -> list[tuple[int, bool]]:
    """Those of ``samples`` that a rank evaluates, and whether each counts. All ranks get the same number of whole
    batches: what is short is filled with repetitions that do not count."""
    per_rank = -(-len(samples) // share.world_size)
    padded = -(-per_rank // share.batch_size) * share.batch_size
    first, end = share.rank * per_rank, min((share.rank + 1) * per_rank, len(samples))
    return [(samples[min(number, len(samples) - 1)], number < end) for number in range(first, first + padded)]


def divisible_count(most: int) -> int:
    """The largest of 96·2^k, 48, 24, 12, 6, 4, 2, 1 that is at most ``most``: numbers that many counts divide."""
    if most >= 96:
        return 96 << ((most // 96).bit_length() - 1)
    return next((number for number in (48, 24, 12, 6, 4, 2) if number <= most), 1)


def stream_count(shards: int, wanted: int | None, world_size: int, workers: int, where: str, key: str = "data") -> int:
    """V, the number of virtual streams: ``wanted``, or by the number of ``shards`` of the set at ``where``.

    UsageError if there are fewer shards than that, or if the readers (ranks x workers) do not divide it; it says
    which numbers would do, of the config's ``key``.
    """
    streams = wanted or divisible_count(shards)
    more = "shard again into more shards (max_shards, min_samples_per_shard)"
    if streams > shards:
        raise UsageError(
            f"{where}: {key}.virtual_streams={streams}, but only {shards} shards; use at most {shards}, or {more}"
        )
    readers = world_size * max(workers, 1)
    if streams % readers == 0:
        return streams
    ways = []
    if streams % world_size == 0:
        ways.append(f"data.workers={_or([w for w in range(1, workers) if streams // world_size % w == 0])}")
    else:
        fit = [n for n in range(1, min(streams, world_size) + 1) if streams % n == 0]
        ways.append(f"resources.processes={_or(fit)}")
    if readers <= shards:
        ways.append(f"{key}.virtual_streams={shards // readers * readers}")
    raise UsageError(
        f"{where}: {world_size} processes with {max(workers, 1)} workers each cannot share {streams} virtual streams "
        f"({shards} shards) evenly; use {', or '.join(ways)}, or {more}"
    )


def check_buffer(
    streams: int, window_bytes: int, limit: int, world_size: int, workers: int, where: str, key: str = "data"
) -> None:
    """UsageError if the windows that a worker holds, one for each of its virtual streams, may exceed ``limit`` bytes;
    it says which numbers would fit."""
    readers = world_size * max(workers, 1)
    if streams // readers * window_bytes <= limit:
        return
    fit = [w for w in range(1, streams // world_size + 1) if streams % (world_size * w) == 0]
    enough = next((w for w in fit if streams // (world_size * w) * window_bytes <= limit), None)
    ways = [f"data.workers={enough}"] if enough else []
    if fewer := limit // window_bytes * readers:
        ways.append(f"{key}.virtual_streams={divisible_count(fewer) // readers * readers or readers}")
    ways.append(f"data.buffer_bytes={streams // readers * window_bytes}")
    raise UsageError(
        f"{where}: each of {max(workers, 1)} workers of {world_size} processes would hold {streams // readers} of "
        f"{streams} virtual streams with a window of up to {window_bytes:,} bytes, more than data.buffer_bytes "
        f"{limit:,}; use {', or '.join(ways)}, or shard with smaller window_bytes"
    )


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
