"""Running a pipeline on this machine: one job after another, only what is missing, and a table at the end."""

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from launcher.config import ClusterConfig, PipelineConfig
from launcher.jobs import result_of
from launcher.local import run_job
from launcher.pipeline import Action, Job, plan
from launcher.progress import format_seconds
from launcher.rundir import locked, refuse_foreign
from stpredict.config import as_yaml
from stpredict.run import write_atomically

console = Console(highlight=False, markup=False, soft_wrap=True)


def launch(
    pipeline: PipelineConfig,
    jobs: Sequence[Job],
    cluster: ClusterConfig,
    rerun: Collection[str] = (),
    run_job: Callable[..., int] = run_job,
) -> int:
    """Runs ``jobs`` in order up to the first that does not end well; returns its exit status, otherwise 0."""
    refuse_foreign(pipeline.run, "pipeline.yaml", pipeline.jobs)
    with locked(pipeline.run):
        actions = plan(jobs, rerun)
        write_atomically(pipeline.run / "pipeline.yaml", as_yaml(pipeline))
        for job in jobs:
            if actions[job.name] == "rerun":
                _set_aside(job.run.path)
        seconds: dict[str, float] = {}
        code = 0
        for job in jobs:
            if actions[job.name] == "skip":
                console.print(f"{job.name}: up to date")
                continue
            began = time.monotonic()
            code = run_job(job.config, job.name, job.fingerprint, cluster.threads)
            seconds[job.name] = time.monotonic() - began
            console.print(f"{job.name}: {job.run.status().state} in {format_seconds(seconds[job.name])}")
            if code:
                break
    console.print(_table(jobs, actions, seconds))
    if code:
        waiting = [job.name for job in jobs if actions[job.name] != "skip" and job.name not in seconds]
        console.print(f"not run: {', '.join(waiting)}" if waiting else "")
    else:
        for job in jobs:
            if job.config.kind == "report":
                print(result_of(job.config))
    return code


def show_plan(jobs: Sequence[Job], rerun: Collection[str] = ()) -> None:
    """Prints the order of the jobs and what a launch would do with each."""
    actions = plan(jobs, rerun)
    table = Table("job", "kind", "needs", "would", "run directory", box=box.SIMPLE)
    for job in jobs:
        table.add_row(job.name, job.config.kind, ", ".join(job.needs), actions[job.name], str(job.run.path))
    console.print(table)


def _set_aside(path: Path) -> None:
    """Renames a run directory to the first free NAME.old-K."""
    number = 1
    while (old := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    with locked(path):
        path.rename(old)
    console.print(f"{path} is now {old}")


def _table(jobs: Sequence[Job], actions: dict[str, Action], seconds: dict[str, float]) -> Table:
    table = Table("job", "state", "time", box=box.SIMPLE)
    for job in jobs:
        status = job.run.status()
        time_of = "up to date" if actions[job.name] == "skip" else format_seconds(seconds.get(job.name))
        table.add_row(job.name, status.state if status else "not run", time_of)
    return table
