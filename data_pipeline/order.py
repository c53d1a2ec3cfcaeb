"""The order in which samples are read: arithmetic alone, no files. Torch-free.

An epoch's shard order is a permutation by (seed, epoch), dealt round robin to V virtual streams. A stream reads its
shards one after another, each window in an order by (seed, epoch, shard, window), and rolls into its own next epoch
when it ends. **Global sample n is number n div V of virtual stream n mod V**, so the order depends on (seed, V) and
on neither ranks, workers nor batch sizes; and it can be entered at any n without reading what came before.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.seeding import generator


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
        self._totals = [sum(windows) for windows in counts]

    def samples(self, consumed: int, reader: int = 0, readers: int = 1) -> Iterator[tuple[int, Slot]]:
        """Every ``readers``-th global sample from ``consumed + reader`` on, each with its virtual stream.

        ``streams`` must be a multiple of ``readers``: then no two readers share a stream.
        """
        opened: dict[int, Iterator[Slot]] = {}
        for number in count(consumed + reader, readers):
            position, stream = divmod(number, self.streams)
            if stream not in opened:
                opened[stream] = self.stream(stream, position)
            yield stream, next(opened[stream])

    def stream(self, stream: int, start: int) -> Iterator[Slot]:
        """The samples of one virtual stream, for ever, from its ``start``-th on."""
        skip = start
        for epoch in count():
            for shard in self._shards(epoch)[stream :: self.streams]:
                if skip >= self._totals[shard]:
                    skip -= self._totals[shard]
                    continue
                for window, samples in enumerate(self._counts[shard]):
                    if skip >= samples:
                        skip -= samples
                        continue
                    order = generator("window", self._seed, epoch, shard, window).permutation(samples)
                    for position in order[skip:].tolist():
                        yield Slot(epoch, shard, window, position)
                    skip = 0

    def _shards(self, epoch: int) -> list[int]:
        return generator("shards", self._seed, epoch).permutation(len(self._counts)).tolist()


class FileOrder:
    """Samples as they stand in the manifest, each once: the order of evaluation."""

    def __init__(self, counts: Sequence[Sequence[int]]):
        self._windows = [(shard, window) for shard, windows in enumerate(counts) for window in range(len(windows))]
        self._ends = np.cumsum([samples for windows in counts for samples in windows])

    def slot(self, index: int, epoch: int) -> Slot:
        """Where sample number ``index`` of the set stands."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return Slot(epoch, *self._windows[number], index - start)


def shares(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """The samples that ``rank`` evaluates, and whether each counts. All ranks get the same number of whole batches:
    what is short is filled with repetitions that do not count."""
    per_rank = -(-samples // world_size)
    padded = -(-per_rank // batch_size) * batch_size
    first, end = rank * per_rank, min((rank + 1) * per_rank, samples)
    return [(min(index, samples - 1), index < end) for index in range(first, first + padded)]


def divisible_count(most: int) -> int:
    """The largest of 96·2^k, 48, 24, 12, 6, 4, 2, 1 that is at most ``most``: numbers that many counts divide."""
    if most >= 96:
        return 96 << ((most // 96).bit_length() - 1)
    return next((number for number in (48, 24, 12, 6, 4, 2) if number <= most), 1)


def stream_count(shards: int, wanted: int | None, world_size: int, workers: int, where: str) -> int:
    """V, the number of virtual streams: ``wanted``, or by the number of ``shards`` of the set at ``where``.

    UsageError if there are fewer shards than that, or if the readers (ranks x workers) do not divide it; it says
    which numbers would do.
    """
    streams = wanted or divisible_count(shards)
    more = "shard again into more shards (max_shards, min_samples_per_shard)"
    if streams > shards:
        raise UsageError(
            f"{where}: virtual_streams={streams}, but only {shards} shards; use at most {shards}, or {more}"
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
        ways.append(f"virtual_streams={shards // readers * readers}")
    raise UsageError(
        f"{where}: {world_size} processes with {max(workers, 1)} workers each cannot share {streams} virtual streams "
        f"({shards} shards) evenly; use {', or '.join(ways)}, or {more}"
    )


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
