"""Runs that several jobs fill together (``part`` of ``parts``): what a part may touch, and merging them.

Before the merge, ``run`` holds shards and, in ``run/parts/``, a run directory of each part. Merging writes the
manifests and then the config and status of the whole, as one job would have left them: whatever reads runs sees one.
"""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config import SPLITS
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifest import Manifest, fold, write_manifest
from launcher.rundir import changed_keys, fingerprint, is_done, locked, refuse_foreign
from stpredict.config import as_yaml, load
from stpredict.jobs.config import PARTS, AnyJobConfig, JobConfig, PartedJobConfig
from stpredict.run import Run

FREE = ("part",)  # in which the parts of a run may differ
WRITTEN = {PARTS, *SPLITS}  # what parts leave in a run before it is merged


def whole_is_done(config: JobConfig) -> bool:
    """Whether ``config`` is a part of a run that is already merged. UsageError where its run holds the work of
    another config or of a job that does it alone, or is no run directory."""
    if not isinstance(config, PartedJobConfig):
        return False
    run, others = Run(config.run), part_runs(config.run)
    if config.parts == 1:
        if others and not run.config_path.is_file():
            raise UsageError(f"{run.path} is written by several parts; `stpredict merge {run.path}` finishes it")
        return False
    refuse_foreign(run.path, known=WRITTEN)
    if run.config_path.is_file():
        if is_done(run, config.whole):
            return True
        raise UsageError(f"{run.path} holds the work of a job without parts; let it finish, or give another `run`")
    other = next((other for other in others if other.path != config.home), None)
    if other and (changes := changed_keys(other, config, but=FREE)):
        raise UsageError(
            f"{other.path} was made with another config ({', '.join(changes)}); give another `run`, or remove "
            f"{run.path}"
        )
    return False


def part_runs(path: Path) -> list[Run]:
    """The run directories of the parts of ``path``, in the order of their numbers."""
    found = [folder for folder in (path / PARTS).glob("*-of-*") if (folder / "config.yaml").is_file()]
    return [Run(folder) for folder in sorted(found, key=lambda folder: int(folder.name.partition("-of-")[0]))]


def merge(path: Path, print_of: str | None = None) -> dict[Path, Manifest]:
    """Folds the shard sets in ``path``, a run or one set, into their manifests; a run that parts wrote is then done.
    ``print_of`` is its fingerprint in a pipeline.

    UserError if a part or a shard is missing or of another set: then nothing is changed."""
    folders = [folder for folder in (path / split for split in SPLITS) if folder.is_dir()]
    run = path if folders else path.parent
    folders = folders or [path]
    if not any(next(folder.glob("shard-*"), None) for folder in folders):
        raise UsageError(f"{path}: no shards to merge; give a run of `stpredict shard` or `encode`, or a shard set")
    with locked(run):
        parts = part_runs(run)
        config = _config_of(parts) if parts else None
        manifests = {folder: fold(folder, config.parts if config else 1) for folder in folders}
        if config and run == path:
            _refuse_unfinished(run, config, parts)
        for folder, manifest in manifests.items():
            write_manifest(folder, manifest)
        if config and run == path:
            _conclude(Run(run), config.whole, parts, print_of)
    return manifests


def _config_of(parts: Sequence[Run]) -> PartedJobConfig:
    """The config that all ``parts`` have but for their number. UserError where one has another."""
    config = load(AnyJobConfig, parts[0].config_path)
    for part in parts[1:]:
        if changes := changed_keys(part, config, but=FREE):
            raise UserError(f"{part.path} was made with another config than {parts[0].path} ({', '.join(changes)})")
    return config


def _refuse_unfinished(path: Path, config: PartedJobConfig, parts: Sequence[Run]) -> None:
    done = {part.path.name for part in parts if (status := part.status()) is not None and status.state == "done"}
    missing = [number for number in range(config.parts) if f"{number}-of-{config.parts}" not in done]
    if missing:
        raise UserError(
            f"{path}: part {', '.join(map(str, missing))} of {config.parts} is not done; wait for it or run it again "
            f"(`stpredict status {path}`)"
        )


def _conclude(run: Run, config: PartedJobConfig, parts: Sequence[Run], print_of: str | None) -> None:
    """Leaves the status and, last, the config of the whole: it is by the config that a run counts as merged."""
    statuses = [status for part in parts if (status := part.status()) is not None]
    run.update_status(
        kind=config.kind,
        state="done",
        step=sum(status.step for status in statuses),
        steps=sum(status.step for status in statuses),
        unit=statuses[0].unit,
        started=min(status.started for status in statuses),
        finished=max(status.finished for status in statuses),
        fingerprint=print_of or fingerprint(config),
        error=None,
        note=None,
    )
    run.write_config(as_yaml(config))
