"""Launching a pipeline: what is missing is planned, recorded, and given to the executor of the cluster."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import UsageError
from launcher.config import LAUNCHER, ClusterConfig, PipelineConfig, SlurmCluster
from launcher.pipeline import Action, Job, plan
from launcher.record import JobRecord, PipelineRun, Record
from launcher.rundir import locked, refuse_foreign
from launcher.slurm import queue
from launcher.snapshot import snapshot
from stpredict.config import as_yaml
from stpredict.run import now, write_atomically

console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Launch:
    """What an executor is given. ``record`` knows the jobs; the executor adds who does them."""

    run: PipelineRun
    jobs: Sequence[Job]
    actions: dict[str, Action]
    record: Record
    code: Path


class Executor(Protocol):
    """Where jobs are done."""

    def check(self) -> None:
        """UsageError where this machine cannot give it jobs."""

    def run(self, launch: Launch) -> int:
        """Does the jobs that the launch's actions name, or sees to it that they will be done. Returns an exit
        status."""

    def scripts(self, launch: Launch) -> dict[str, str]:
        """What would be submitted: name → text of the batch script. Empty where nothing is."""


def executor_of(cluster: ClusterConfig) -> Executor:
    if isinstance(cluster, SlurmCluster):
        from launcher.slurm.executor import SlurmExecutor

        return SlurmExecutor(cluster)
    from launcher.local_pipeline import LocalExecutor

    return LocalExecutor(cluster)


def launch(
    pipeline: PipelineConfig,
    jobs: Sequence[Job],
    cluster: ClusterConfig,
    rerun: Collection[str] = (),
    cluster_name: str = "local",
    executor: Executor | None = None,
) -> int:
    """Has the ``jobs`` done that are missing or unfinished, each after those it needs. Returns an exit status."""
    executor = executor or executor_of(cluster)
    executor.check()
    run = PipelineRun(pipeline.run)
    refuse_foreign(run.path, "pipeline.yaml", {LAUNCHER, *pipeline.jobs})
    if run.name() not in (None, pipeline.name):
        raise UsageError(
            f"{run.path} is the run of pipeline {run.name()!r}, not of {pipeline.name!r}; give another `run`"
        )
    with locked(run.path):
        before = run.record()
        queued = queue.queued_jobs(before) if before else {}
        actions = plan(jobs, rerun, {name: before.jobs[name].fingerprint for name in queued})
        code = snapshot(run.code)
        for job in jobs:
            if actions[job.name] == "rerun":
                _set_aside(job.run.path)
            if actions[job.name] not in ("skip", "queued") or not run.config_path(job.name).is_file():
                run.write_config(job.name, job.config)
        record = Record(
            pipeline=pipeline.name,
            cluster_name=cluster_name,
            cluster=cluster,
            code=code.name,
            launched=now(),
            jobs={job.name: _job_record(job, actions[job.name], before) for job in jobs},
        )
        write_atomically(run.pipeline_path, as_yaml(pipeline))
        run.write_record(record)
        return executor.run(Launch(run, jobs, actions, record, code))


def show_plan(jobs: Sequence[Job], rerun: Collection[str] = ()) -> None:
    """Prints the order of the jobs and what a launch would do with each."""
    actions = plan(jobs, rerun)
    table = Table("job", "kind", "needs", "would", "run directory", box=box.SIMPLE)
    for job in jobs:
        table.add_row(job.name, job.config.kind, ", ".join(job.needs), actions[job.name], str(job.run.path))
    console.print(table)


def _job_record(job: Job, action: Action, before: Record | None) -> JobRecord:
    old = before.jobs.get(job.name) if before and action != "rerun" else None
    submitted = old.submitted if old else []
    return JobRecord(needs=job.needs, fingerprint=job.fingerprint, array=job.array, submitted=submitted)


def _set_aside(path: Path) -> None:
    """Renames a run directory to the first free NAME.old-K."""
    number = 1
    while (old := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    with locked(path):
        path.rename(old)
    console.print(f"{path} is now {old}")
