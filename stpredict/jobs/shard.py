"""Data set → WebDataset shards: fills ``run/train`` and ``run/val``.

Rank 0 finds (or renders) the videos and plans the shards, every rank writes its share, rank 0 merges. Needs no torch
with one process; with several, torch.distributed carries the plans.
"""

import logging
import os
from datetime import timedelta
from typing import Any

from data_pipeline.disk import check_space
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.shards import ShardPlan, plan_shards, shard_count, unfinished, write_shards
from data_pipeline.sources.source import walk
from stpredict.jobs.config import ShardConfig
from stpredict.run import Progress, Run

log = logging.getLogger(__name__)


def run(config: ShardConfig, run: Run) -> None:
    """Writes the shards that are not there yet. UsageError or UserError if there is nothing to shard or no room."""
    ranks = _Ranks()
    plans = ranks.share(plan(config, run) if ranks.rank == 0 else None)
    mine = {split: split_plans[ranks.rank :: ranks.size] for split, split_plans in plans.items()}
    total = sum(len(shard.samples) for split_plans in mine.values() for shard in split_plans)
    progress, before = Progress(run, total, "video"), 0
    for split, split_plans in mine.items():

        def report(done: int, _: int, before: int = before) -> None:
            if ranks.rank == 0:
                progress.update(before + done, "written")

        write_shards(config.run / split, split_plans, report)
        before += sum(len(shard.samples) for shard in split_plans)
    ranks.wait()
    if ranks.rank == 0:
        for split in plans:
            merge(config.run / split)
        progress.update(total, "written")
        if line := left_out(run):
            log.warning("%s", line)
    ranks.leave()


def left_out(run: Run) -> str | None:
    """How many videos a finished job left out, in a line that says where they are named; None if it took all."""
    folders = (run.path / "train", run.path / "val")
    manifests = [read_manifest(folder) for folder in folders if (folder / "manifest.json").is_file()]
    skipped = sum(manifest.skipped for manifest in manifests)
    if not skipped:
        return None
    total = skipped + sum(manifest.samples for manifest in manifests)
    return f"{skipped} of {total} videos could not be read and were left out; {run.logs}/rank_*.log names them"


def plan(config: ShardConfig, run: Run) -> dict[str, list[ShardPlan]]:
    """The shards of each split that has videos, after making sure that the disk holds those still to be written."""
    progress = Progress(run, None, "video")

    def report(done: int, total: int) -> None:
        progress.steps = total
        progress.update(done, "rendered")

    samples = walk(config.source, config.run, report)
    classes = sorted({sample.label for sample in samples if sample.label is not None})
    plans = {}
    for split in ("train", "val"):
        of_split = [sample for sample in samples if sample.split == split]
        if of_split:
            count = shard_count(len(of_split), config.max_shards, config.min_samples_per_shard)
            plans[split] = plan_shards(
                of_split, classes, shards=count, window_bytes=config.window_bytes, seed=config.seed
            )
    todo = [shard for split, of_split in plans.items() for shard in unfinished(config.run / split, of_split)]
    check_space(config.run, sum(shard.bytes for shard in todo))
    return plans


class _Ranks:
    """This process among those that do the job, as torch.distributed's environment says. Alone it needs no torch."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            import torch.distributed as dist

            # Walking a data set of millions of files takes longer than the default half hour.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
