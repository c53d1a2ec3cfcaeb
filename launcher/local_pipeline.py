"""The local executor of pipelines: the jobs of a launch on this machine, one after another or several at once, and a
table at the end."""

import os
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data_pipeline.errors import UserError
from launcher import local
from launcher.config import LocalCluster
from launcher.jobs import result_of
from launcher.launch import Launch
from launcher.local import POLL_S, PREEMPTED, Running, running, stop_signals
from launcher.parts import merge
from launcher.pipeline import Job
from launcher.progress import bars_of_jobs, format_seconds
from launcher.share import Gpus, gpus_here, threads_of
from launcher.turns import Schedule
from stpredict.run import Run

console = Console(highlight=False, markup=False, soft_wrap=True)
MOST_LISTED = 20  # jobs that are up to date and get a line each


class LocalExecutor:
    """Runs the jobs in order, ``cluster.jobs`` of them at once, but those that need one that did not end well. When one
    is asked to stop, no further one starts. Ends with the exit status of the first that did not end well, or 0."""

    def __init__(self, cluster: LocalCluster, running: Callable[..., Running[int]] = running):
        self.cluster, self.running = cluster, running

    def check(self) -> None:
        """Any machine can."""

    def check_jobs(self, launch: Launch) -> None:
        """Whatever ranks a job has, they are processes here."""

    def scripts(self, launch: Launch) -> dict[str, str]:
        return {}

    def run(self, launch: Launch) -> int:
        with launch.committed():
            pass
        up_to_date = [job.name for job in launch.jobs if launch.actions[job.name] == "skip"]
        for name in up_to_date if len(up_to_date) <= MOST_LISTED else ():
            console.print(f"{name}: up to date")
        if len(up_to_date) > MOST_LISTED:
            console.print(f"{len(up_to_date)} jobs: up to date")
        schedule = Schedule(launch.to_do, up_to_date, launch.pipeline.at_once)
        seconds, code = _Loop(launch, self.cluster, self.running).run(schedule)
        console.print(_table(launch, seconds))
        if code:
            waiting = [job.name for job in launch.to_do if job.name not in seconds]
            console.print(f"not run: {', '.join(waiting)}" if waiting else "")
        else:
            for job in launch.jobs:
                if job.config.kind in ("report", "study_report"):
                    print(result_of(job.config))
        return code


class _Loop:
    """The one loop that serves all jobs that run."""

    def __init__(self, launch: Launch, cluster: LocalCluster, running: Callable[..., Running[int]]):
        self.launch, self.cluster, self.running = launch, cluster, running
        self.several = cluster.jobs > 1  # otherwise a job has the machine to itself, as it is
        self.gpus = Gpus(gpus_here() if self.several else ())
        self.live: dict[str, tuple[Job, Running[int], float]] = {}

    def run(self, schedule: Schedule) -> tuple[dict[str, float], int]:
        """Seconds that each job that was begun has taken, and the exit status of the first that did not end well."""
        seconds: dict[str, float] = {}
        code, stopping = 0, False
        with ExitStack() as stack:
            stops = stack.enter_context(stop_signals())
            bars = stack.enter_context(bars_of_jobs(local.console)) if self.several else None
            stack.callback(self._close)
            while True:
                if not stopping and not stops:
                    self._start_what_may(schedule, stops, bars)
                if not self.live:
                    break
                for job, ended in self._look():
                    seconds[job.name] = time.monotonic() - self.live.pop(job.name)[2]
                    schedule.end(job, ended == 0)
                    self.gpus.give_back(job.name)
                    if ended == 0:
                        console.print(f"{job.name}: {job.run.status().state} in {format_seconds(seconds[job.name])}")
                    code = code or ended
                    stopping = stopping or ended == PREEMPTED
                time.sleep(POLL_S)
        return seconds, code or (PREEMPTED if stops and schedule.waiting else 0)

    def _start_what_may(self, schedule: Schedule, stops: list[int], bars: Progress | None) -> None:
        while len(self.live) < self.cluster.jobs and (job := schedule.next()):
            gpus = self.gpus.take(job.name, job.config)
            if gpus is None:
                return  # it is the next to get some, lest smaller ones keep it waiting for ever
            schedule.start(job)
            threads = self.cluster.threads
            if self.several and not threads:
                threads = threads_of(job.config, self.cluster.jobs, len(os.sched_getaffinity(0)))
            shared = {"gpus": gpus if self.gpus.there else None, "stops": stops, "bars": bars}
            self.live[job.name] = job, self._all_of(job, threads, shared), time.monotonic()

    def _all_of(self, job: Job, threads: int | None, shared: dict[str, Any]) -> Running[int]:
        """A job or, of an array's, what is missing of its tasks, one after another, and then the merge."""
        code = self.launch.code
        if not job.array:
            return (yield from self.running(job.config, job.name, job.fingerprint, threads, code=code, **shared))
        for part in self.launch.missing_parts(job):
            name, config = f"{job.name}.{part}", job.parts[part]
            if status := (yield from self.running(config, name, job.fingerprint, threads, code=code, **shared)):
                return status
        merge(job.run.path, job.fingerprint)
        return 0

    def _look(self) -> list[tuple[Job, int]]:
        """Goes on with every job that runs; those that have ended, with their exit status."""
        ended = []
        for job, generator, _ in self.live.values():
            try:
                next(generator)
            except StopIteration as end:
                ended.append((job, end.value))
            except UserError as error:  # its directory is in use, its merge refused: no matter to the others
                local.say(f"error: {job.name}: {error}", style="red")
                ended.append((job, error.exit_status))
            except Exception as error:  # ours: the others go on, and end with a status of their own
                if os.environ.get("STPREDICT_DEBUG"):
                    traceback.print_exc()
                what = f"internal error: {type(error).__name__}: {error}"
                local.say(f"error: {job.name}: {what} (rerun with --debug for the traceback)", style="red")
                ended.append((job, 1))
        return ended

    def _close(self) -> None:
        """Of an error that is not the jobs' own: nothing that was started here goes on alone."""
        for _, generator, _ in self.live.values():
            generator.close()


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
