"""Data set → WebDataset shards: fills ``run/train`` and ``run/val``, and ``run/test`` where the source has one.

Rank 0 finds the samples and plans the shards, every rank writes its share, rank 0 merges. Where several jobs write one
set, each plans all of it and writes its part; `stpredict merge` follows. Needs no torch with one process; with several,
torch.distributed carries the plans.
"""

import logging
import os
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Self

from data_pipeline.config import SPLITS
from data_pipeline.disk import check_space
from data_pipeline.manifest import merge, read_manifest, shard_name
from data_pipeline.shards import ShardPlan, plan_shards, shard_count, unfinished, write_shards
from data_pipeline.sources.source import describe, walk
from stpredict.jobs.config import ShardConfig
from stpredict.run import Progress, Run

log = logging.getLogger(__name__)


class Extent(NamedTuple):
    samples: int
    bytes: int


class Work(NamedTuple):
    """This job's shards of each split that has samples, and how large those are that are not written yet, by the path
    of their NAME.json."""

    plans: dict[str, list[ShardPlan]]
    todo: dict[Path, Extent]


def run(config: ShardConfig, run: Run) -> None:
    """Writes the shards that are not there yet. UsageError or UserError if there is nothing to shard or no room."""
    ranks = _Ranks()
    work = plan(config) if ranks.rank == 0 else None
    mine = ranks.deal(work and work.plans)
    with _Watch(run, work) if work else nullcontext():
        for split, plans in mine.items():
            write_shards(config.run / split, plans, workers=config.workers, timeout_s=config.timeout_s)
        ranks.wait()
    if work and config.parts == 1:
        for split in work.plans:
            merge(config.run / split)
        if line := left_out(config):
            log.warning("%s", line)
    ranks.leave()


def plan(config: ShardConfig) -> Work:
    """What this job, one of ``config.parts``, is to write, after making sure that the disk holds it."""
    samples = walk(config.source)
    description = describe(config.source, samples)
    plans, todo = {}, {}
    for split in SPLITS:
        of_split = [sample for sample in samples if sample.split == split]
        if of_split:
            count = shard_count(len(of_split), config.max_shards, config.min_samples_per_shard)
            every = plan_shards(
                config.source,
                of_split,
                description,
                shards=count,
                window_bytes=config.window_bytes,
                seed=config.seed,
            )
            plans[split] = every[config.part :: config.parts]
            for shard in unfinished(config.run / split, plans[split]):
                path = config.run / split / f"{shard_name(shard.index)}.json"
                todo[path] = Extent(len(shard.samples), shard.bytes)
    check_space(config.run, sum(extent.bytes for extent in todo.values()))
    return Work(plans, todo)


def left_out(config: ShardConfig) -> str | None:
    """How many samples a finished job left out, in a line that says where they are named; None if it took all, or is
    a part: merging tells."""
    if config.parts > 1:
        return None
    folders = [config.run / split for split in SPLITS]
    manifests = [read_manifest(folder) for folder in folders if (folder / "manifest.json").is_file()]
    skipped = sum(manifest.skipped for manifest in manifests)
    if not skipped:
        return None
    total = skipped + sum(manifest.samples for manifest in manifests)
    return (
        f"{skipped} of {total} samples could not be read and were left out; "
        f"`skipped` in {config.run}/*/shard-*.json names them and says why"
    )


class _Watch:
    """Reports now and then what all ranks have written, which the names in the folders tell. Use as a context
    manager."""

    def __init__(self, run: Run, work: Work, interval_s: float = 1.0):
        self._todo, self._interval_s = work.todo, interval_s
        samples = sum(len(shard.samples) for of_split in work.plans.values() for shard in of_split)
        self._before = samples - sum(extent.samples for extent in work.todo.values())
        self._progress = Progress(run, samples, "sample", interval_s=0)
        self._began, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        self._progress.update(self._before, "written")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()  # two writers would be one too many for status.json
        if kind is None:
            self._report()

    def _loop(self) -> None:
        wait_s = self._interval_s
        while not self._ended.wait(wait_s):
            began = time.monotonic()
            self._report()
            # Listing very many shards is work for a file system that many jobs share: a twentieth of the time at most.
            wait_s = max(self._interval_s, 20 * (time.monotonic() - began))

    def _report(self) -> None:
        names = {folder: _names(folder) for folder in {path.parent for path in self._todo}}
        written = [extent for path, extent in self._todo.items() if path.name in names[path.parent]]
        growing = sum(_size(folder / name) for folder in names for name in names[folder] if self._is_mine(folder, name))
        size = sum(extent.bytes for extent in written) + growing
        speed = size / 1e6 / max(time.monotonic() - self._began, 1e-3)
        done = self._before + sum(extent.samples for extent in written)
        self._progress.update(done, "written", **{"MB": size / 1e6, "MB/s": speed})

    def _is_mine(self, folder: Path, name: str) -> bool:
        """Whether ``name`` is the temporary one of a tar of this job."""
        shard, _, rest = name.removeprefix(".").partition(".")
        return name.startswith(".") and rest.startswith("tar.") and folder / f"{shard}.json" in self._todo


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # just renamed
        return 0


class _Ranks:
    """This process among those that do the job, as torch.distributed's environment says. Alone it needs no torch."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            import torch.distributed as dist

            # Walking a data set of millions of files takes longer than the default half hour.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def deal(self, plans: dict[str, list[ShardPlan]] | None) -> dict[str, list[ShardPlan]]:
        """Every rank's share of rank 0's plans, and no more: those of millions of samples take gigabytes."""
        if self.size == 1:
            return plans
        import torch.distributed as dist

        shares, mine = None, [None]
        if plans is not None:
            shares = [{split: of[rank :: self.size] for split, of in plans.items()} for rank in range(self.size)]
        dist.scatter_object_list(mine, shares, src=0)
        return mine[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
