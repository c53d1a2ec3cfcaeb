"""``stpredict resume``: launches again what a run is missing, from what the run itself holds: the YAML files that it
was launched from may have been edited since, or be gone."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from data_pipeline.errors import UsageError
from launcher import jobs
from launcher.config import ClusterConfig, PipelineConfig, SlurmCluster, load_cluster
from launcher.overview import rows, runs_of
from launcher.parts import merge, part_runs
from launcher.pipeline import Job
from launcher.record import PipelineRun, Record, pipeline_of
from stpredict.config import load
from stpredict.jobs.config import AnyJobConfig
from stpredict.jobs.start import command_of
from stpredict.run import Run


@dataclass(frozen=True)
class Resumable:
    """What ``launch`` is to be given."""

    pipeline: PipelineConfig
    jobs: list[Job]
    cluster: ClusterConfig
    cluster_name: str


def resumable(path: Path, cluster: str | None = None) -> Resumable:
    """The pipeline whose run ``path`` is, as it was launched, on the cluster that it was launched on or on ``cluster``.
    Makes the directory of that launch the current one: paths in configs are relative to it."""
    run = PipelineRun(path.absolute())
    record = run.record()
    if record is None:
        raise UsageError(f"{path} was launched before launches left a record; launch it again from its pipeline file")
    where = load_cluster(cluster, run.pipeline_path) if cluster else record.cluster
    _go_to(record)
    pipeline = load(PipelineConfig, run.pipeline_path, run_of=lambda name: f"${{run:{name}}}")
    if pipeline.run.resolve() != run.path.resolve():
        raise UsageError(
            f"{path} was launched as {pipeline.run.absolute()}, and its jobs' configs name each other's runs there; "
            "move it back"
        )
    found = [
        Job(name, job.needs, run.config(name), job.fingerprint, job.array, job.after, job.trial)
        for name, job in record.jobs.items()
    ]
    return Resumable(pipeline, found, where, cluster or record.cluster_name)


def _go_to(record: Record) -> None:
    if record.directory is None or Path(record.directory) == Path.cwd():
        return
    try:
        os.chdir(record.directory)
    except OSError as error:
        raise UsageError(f"{record.directory}: it was launched there, but {error.strerror}") from None
    print(f"in {record.directory}, where it was launched", file=sys.stderr)


def _refuse_of_slurm(path: Path) -> None:
    """A job that nodes of a cluster did is not for the login node that somebody types this on."""
    match pipeline_of(path):
        case folder, Record(cluster=SlurmCluster()) as record:
            raise UsageError(
                f"{path} is a job of a pipeline that was launched with --cluster {record.cluster_name}; it goes on "
                f"there by: stpredict resume {quote(str(folder))}"
            )


def resume_job(path: Path, options: Sequence[str] = ()) -> int:
    """Goes on here with the run of a single job, or with the parts of one that have begun and their merge. Returns an
    exit status. ``options`` are those that were given, and make sense for pipelines only."""
    if options:
        raise UsageError(f"{path} is the run of a job, and {options[0]} is for pipelines")
    waiting = [row for row in rows(path) if row.live]
    if waiting:
        ids = f", SLURM job {waiting[0].slurm_ids[0]}" if waiting[0].slurm_ids else ""
        what = f"{waiting[0].job} is {waiting[0].state}{ids}"
        raise UsageError(f"{path}: {what}; first: stpredict cancel {quote(str(path))}")
    _refuse_of_slurm(path)
    for run in runs_of(path).values():
        config = load(AnyJobConfig, run.config_path)
        print(f"stpredict {command_of(config.kind)} {run.config_path}", file=sys.stderr)
        if status := jobs.run(config):
            return status
    if part_runs(path) and not Run(path).config_path.is_file():
        for folder, manifest in merge(path).items():
            print(f"{folder}: {manifest.samples:,} samples in {len(manifest.shards):,} shards")
    return 0
