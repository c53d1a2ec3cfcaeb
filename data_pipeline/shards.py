"""Samples of a source → a set of WebDataset shards.

Samples are dealt to the shards of their split in a seeded shuffled order, so that a shard is a fair sample of the
set. Each shard is planned before it is written and finished on its own: a rerun redoes only what is missing or
planned otherwise, and several processes can write one set. ``data_pipeline.manifest.merge`` then makes it readable.

Every sample is read and looked into once, in a process that it may bring down; what is unreadable is left out by name.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.arrays import load_array
from data_pipeline.config import Source
from data_pipeline.decode import probe
from data_pipeline.errors import DecodeError
from data_pipeline.isolated import Failure, isolated
from data_pipeline.manifest import FORMAT, Description, Moments, clear, plan_hash, read_record
from data_pipeline.order import divisible_count
from data_pipeline.seeding import generator
from data_pipeline.sources.source import SourceSample, read
from data_pipeline.tar_shard import TarShard

log = logging.getLogger(__name__)

AROUND_SAMPLE = 3072  # bytes: about the most that tar headers and KEY.json take
STATS = 16  # at a time: on a parallel file system each waits for its servers


def shard_count(samples: int, most: int, fewest_samples: int = 1) -> int:
    """Shards for ``samples`` samples: as many as divide well, at most ``most``, with ``fewest_samples`` in each."""
    return divisible_count(min(most, samples // fewest_samples))


@dataclass(frozen=True)
class ShardPlan:
    """What one shard shall hold. ``index`` of ``shards``; ``bytes`` is about what it will take; ``hash`` is the same
    whenever the outcome would be."""

    index: int
    shards: int
    source: Source
    samples: tuple[SourceSample, ...]
    description: Description
    window_bytes: int
    bytes: int
    hash: str


def plan_shards(
    source: Source,
    samples: Sequence[SourceSample],
    description: Description,
    *,
    shards: int,
    window_bytes: int,
    seed: int,
) -> list[ShardPlan]:
    """Deals the samples of one split to ``shards`` shards, round robin in a shuffled order.

    ``description`` is that of all splits. The same data elsewhere are the same: no path decides what a shard holds.
    """
    order = generator("deal", seed).permutation(len(samples))
    recipe = {name: value for name, value in source.model_dump().items() if not isinstance(value, Path)}
    keys = [samples[position].key for position in order]
    whole = plan_hash(FORMAT, recipe, description.model_dump(mode="json"), shards, window_bytes, keys)
    description = description.model_copy(update={"plan": whole})
    paths = {path for sample in samples for path in (sample.path, *sample.more_paths)}
    with ThreadPoolExecutor(STATS) as pool:
        files = dict(zip(paths, pool.map(_size_and_time, paths), strict=True))
    plans = []
    for index in range(shards):
        dealt = tuple(samples[position] for position in order[index::shards])
        size = sum(files[sample.path][0] if sample.bytes is None else sample.bytes for sample in dealt)
        contents = [_content(sample) for sample in dealt]
        seen = [files[path] for sample in dealt for path in (sample.path, *sample.more_paths)]
        shard_hash = plan_hash(whole, index, contents, seen)
        size += AROUND_SAMPLE * len(dealt)
        plans.append(ShardPlan(index, shards, source, dealt, description, window_bytes, size, shard_hash))
    return plans


def _content(sample: SourceSample) -> dict[str, Any]:
    """All but where it is."""
    content = {**asdict(sample), "path": None}
    del content["more_paths"]
    return content


def _size_and_time(path: Path | None) -> tuple[int, int]:
    """Of a file; zeros where it is gone: its sample will be left out."""
    try:
        about = path.stat() if path else None
    except OSError:
        about = None
    return (about.st_size, about.st_mtime_ns) if about else (0, 0)


def unfinished(folder: str | Path, plans: Sequence[ShardPlan]) -> list[ShardPlan]:
    """The plans whose shards are still to be written, or are there for another plan."""
    records = ((plan, read_record(Path(folder), plan.index)) for plan in plans)
    return [plan for plan, record in records if record is None or record.plan != plan.hash]


def write_shards(folder: str | Path, plans: Sequence[ShardPlan], *, workers: int = 1, timeout_s: float = 600) -> None:
    """Writes the shards of ``plans``, all of a set or a process's share, that are not finished yet; ``merge`` them
    when every share is written. The number of ``workers``, the processes that look into samples, changes nothing in
    them; a sample that takes a worker longer than ``timeout_s`` is left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    todo = unfinished(folder, plans)
    if not todo:
        return
    clear(folder, [plan.index for plan in todo], todo[0].shards)
    with _removed(folder / f".unpacked-{plans[0].index:06d}") as scratch:
        items = [(plan.source, sample, scratch) for plan in todo for sample in plan.samples]
        with closing(isolated(look, items, workers=min(workers, len(items)), timeout_s=timeout_s)) as looks:
            for plan in todo:
                _write_shard(folder, plan, islice(looks, len(plan.samples)))


@contextmanager
def _removed(scratch: Path) -> Iterator[Path]:
    """``scratch``, should it be made, is gone after the block; and before it, what a killed process left of it."""
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Look:
    """A sample's member of the shard, what KEY.json says of it, and the moments of a physical field."""

    extension: str
    data: bytes
    about: dict[str, Any]
    moments: Moments | None = None


def look(item: tuple[Source, SourceSample, Path]) -> Look | Failure:
    """Reads a sample, with a folder for what many samples share, and makes sure that it can be decoded."""
    try:
        extension, data = read(*item)
        if extension != "npy":
            return Look(extension, data, asdict(probe(data)))
        array = load_array(data)
    except (DecodeError, OSError) as error:
        return Failure(str(error))
    frames, height, width, _ = array.shape
    about = {"frames": frames, "height": height, "width": width, "fps": None}
    return Look(extension, data, about, moments(array) if array.dtype == np.float32 else None)


def moments(array: np.ndarray) -> Moments:
    """Of each channel of an array (t, h, w, c), summed in float64."""
    mean = array.mean(axis=(0, 1, 2), dtype=np.float64)
    m2 = sum(np.square(frame - mean).sum(axis=(0, 1)) for frame in array)
    return Moments(count=array[..., 0].size, mean=mean.tolist(), m2=m2.tolist())


def _write_shard(folder: Path, plan: ShardPlan, looks: Iterator[Look | Failure]) -> None:
    """Writes one shard. A sample that cannot be read is left out, counted and logged."""
    tar, skipped, parts = TarShard(folder, plan.index, plan.window_bytes), {}, []
    classes = plan.description.classes
    try:
        for sample, seen in zip(plan.samples, looks, strict=True):
            if isinstance(seen, Failure):
                log.warning("%s: left out: %s", sample.path or sample.name, seen.reason)
                skipped[sample.key] = seen.reason
                continue
            about = {
                "source": plan.source.kind,
                "name": sample.name,
                "label": sample.label,
                "class": -1 if sample.label is None else classes.index(sample.label),
                **sample.metadata,
                **seen.about,
            }
            tar.add(sample.key, {seen.extension: seen.data}, about)
            if seen.moments:
                parts.append(seen.moments)
        tar.finish(plan.description, plan.shards, plan.hash, skipped, reduce(add, parts) if parts else None)
    finally:
        tar.discard()
