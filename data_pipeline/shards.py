"""Videos → a set of WebDataset shards.

Samples are dealt to the shards of their split in a seeded shuffled order, so that a shard is a fair sample of the
set. Each shard is planned before it is written and finished on its own: a rerun redoes only what is missing or
planned otherwise, and several processes can write one set. ``data_pipeline.manifest.merge`` then makes it readable.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.decode import DecodeError, probe
from data_pipeline.manifest import FORMAT, Description, clear, plan_hash, read_record
from data_pipeline.order import divisible_count
from data_pipeline.seeding import generator
from data_pipeline.sources.source import SourceSample
from data_pipeline.tar_shard import TarShard

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # done, total


def shard_count(samples: int, most: int, fewest_samples: int = 1) -> int:
    """Shards for ``samples`` samples: as many as divide well, at most ``most``, with ``fewest_samples`` in each."""
    return divisible_count(min(most, samples // fewest_samples))


@dataclass(frozen=True)
class ShardPlan:
    """What one shard shall hold. ``index`` of ``shards``; ``hash`` is the same whenever the outcome would be."""

    index: int
    shards: int
    samples: tuple[SourceSample, ...]
    description: Description
    window_bytes: int
    hash: str

    @property
    def bytes(self) -> int:
        """What the tar will take: the videos, and at most about 3 kB a sample around them."""
        return sum(sample.path.stat().st_size + 3072 for sample in self.samples)


def plan_shards(
    samples: Sequence[SourceSample], classes: list[str], *, shards: int, window_bytes: int, seed: int
) -> list[ShardPlan]:
    """Deals the samples of one split to ``shards`` shards, round robin in a shuffled order."""
    order = generator("deal", seed).permutation(len(samples))
    description = Description(kind="clips", classes=classes)
    plans = []
    for index in range(shards):
        dealt = tuple(samples[position] for position in order[index::shards])
        files = [(sample.path.stat().st_size, sample.path.stat().st_mtime_ns) for sample in dealt]
        contents = [{**asdict(sample), "path": None} for sample in dealt]  # the same videos elsewhere are the same
        parts = (FORMAT, classes, shards, window_bytes, contents, files)
        plans.append(ShardPlan(index, shards, dealt, description, window_bytes, plan_hash(*parts)))
    return plans


def unfinished(folder: str | Path, plans: Sequence[ShardPlan]) -> list[ShardPlan]:
    """The plans whose shards are still to be written, or are there for another plan."""
    records = ((plan, read_record(Path(folder), plan.index)) for plan in plans)
    return [plan for plan, record in records if record is None or record.plan != plan.hash]


def write_shards(folder: str | Path, plans: Sequence[ShardPlan], progress: Progress | None = None) -> None:
    """Writes the shards of ``plans``, all of a set or a process's share, that are not finished yet; ``merge`` them
    when every share is written. ``progress`` counts samples."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    todo = unfinished(folder, plans)
    if todo:
        clear(folder, [plan.index for plan in todo], todo[0].shards)
    total = sum(len(plan.samples) for plan in plans)
    done = total - sum(len(plan.samples) for plan in todo)
    for plan in todo:
        write_shard(folder, plan)
        done += len(plan.samples)
        if progress:
            progress(done, total)


def write_shard(folder: Path, plan: ShardPlan) -> None:
    """Writes one shard. A video that no decoder opens is left out, counted and logged."""
    tar, skipped = TarShard(folder, plan.index, plan.window_bytes), 0
    try:
        for sample in plan.samples:
            try:
                encoded = sample.path.read_bytes()
                info = probe(encoded)
            except (DecodeError, OSError) as error:
                log.warning("%s: left out: %s", sample.path, error)
                skipped += 1
                continue
            label = plan.description.classes.index(sample.label) if sample.label is not None else -1
            description = {
                "label": sample.label,
                "class": label,
                "name": sample.name,
                **sample.metadata,
                **asdict(info),
            }
            tar.add(sample.key, {sample.path.suffix[1:].lower(): encoded}, description)
        tar.finish(plan.description, plan.shards, plan.hash, skipped)
    finally:
        tar.discard()
