"""The local executor of pipelines: one job after another on this machine, and a table at the end."""

import time
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from launcher.config import LocalCluster
from launcher.jobs import result_of
from launcher.launch import Launch
from launcher.local import PREEMPTED, run_job
from launcher.parts import merge
from launcher.pipeline import Job
from launcher.progress import format_seconds
from stpredict.run import Run

console = Console(highlight=False, markup=False, soft_wrap=True)


class LocalExecutor:
    """Runs the jobs in order, but those that need one that did not end well, up to one that is asked to stop. Ends with
    the exit status of the first that did not end well, otherwise 0."""

    def __init__(self, cluster: LocalCluster, run_job: Callable[..., int] = run_job):
        self.cluster, self.run_job = cluster, run_job

    def check(self) -> None:
        """Any machine can."""

    def check_jobs(self, launch: Launch) -> None:
        """Whatever ranks a job has, they are processes here."""

    def scripts(self, launch: Launch) -> dict[str, str]:
        return {}

    def run(self, launch: Launch) -> int:
        seconds: dict[str, float] = {}
        code, unmet = 0, set()
        with launch.committed():
            pass
        for job in launch.jobs:
            if launch.actions[job.name] == "skip":
                console.print(f"{job.name}: up to date")
                continue
            if unmet & set(job.needs):
                unmet.add(job.name)
                continue
            began = time.monotonic()
            ended = self._run_job(job, launch)
            seconds[job.name] = time.monotonic() - began
            if ended:
                code = code or ended
                unmet.add(job.name)
                if ended == PREEMPTED:
                    break
                continue
            console.print(f"{job.name}: {job.run.status().state} in {format_seconds(seconds[job.name])}")
        console.print(_table(launch, seconds))
        if code:
            waiting = [
                job.name for job in launch.jobs if launch.actions[job.name] != "skip" and job.name not in seconds
            ]
            console.print(f"not run: {', '.join(waiting)}" if waiting else "")
        else:
            for job in launch.jobs:
                if job.config.kind in ("report", "study_report"):
                    print(result_of(job.config))
        return code

    def _run_job(self, job: Job, launch: Launch) -> int:
        """Runs a job or, of an array's, what is missing of its tasks and then the merge."""
        threads, code = self.cluster.threads, launch.code
        if not job.array:
            return self.run_job(job.config, job.name, job.fingerprint, threads, code=code)
        for part in launch.missing_parts(job):
            if status := self.run_job(job.parts[part], f"{job.name}.{part}", job.fingerprint, threads, code=code):
                return status
        merge(job.run.path, job.fingerprint)
        return 0


def _table(launch: Launch, seconds: dict[str, float]) -> Table:
    table = Table("job", "state", "time", box=box.SIMPLE)
    for job in launch.jobs:
        status = _status(job.run)
        time_of = "up to date" if launch.actions[job.name] == "skip" else format_seconds(seconds.get(job.name))
        table.add_row(job.name, status, time_of)
    return table


def _status(run: Run) -> str:
    status = run.status()
    return status.state if status else "not run"
