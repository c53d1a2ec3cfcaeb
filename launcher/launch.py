"""Launching a pipeline: what is missing is planned, and given to the executor of the cluster; what is left in the run
then is what was launched, or what was there before."""

import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from rich.console import Console

from data_pipeline.errors import UsageError, UserError
from launcher.changes import Changes
from launcher.config import LAUNCHER, ClusterConfig, PipelineConfig, SlurmCluster
from launcher.pipeline import MOST_NAMED, Action, Job, plan
from launcher.record import JobRecord, PipelineRun, Record
from launcher.rundir import is_empty, locked, refuse_foreign
from launcher.slurm.unfinished import still_to_do
from launcher.snapshot import place_of, snapshot
from launcher.turns import lanes
from stpredict.config import as_yaml
from stpredict.jobs.start import FULL
from stpredict.run import Run, now

console = Console(highlight=False, markup=False, soft_wrap=True)
UNTOUCHED = ("skip", "queued")  # actions: the job is left as it is


@dataclass(frozen=True)
class Launch:
    """What an executor is given. ``record`` knows the jobs; the executor adds who does them. ``behind`` says which
    trials wait for which others, where all are to be lined up at once."""

    pipeline: PipelineConfig
    run: PipelineRun
    jobs: Sequence[Job]
    actions: dict[str, Action]
    record: Record
    code: Path
    before: Record | None = None
    behind: dict[str, tuple[str, ...]] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    @property
    def to_do(self) -> list[Job]:
        return [job for job in self.jobs if self.actions[job.name] not in UNTOUCHED]

    @property
    def left(self) -> list[str]:
        """The jobs of the last launch that this one no longer has, and that have made something."""
        now_there = {job.name for job in self.jobs}
        names = [name for name in (self.before.jobs if self.before else ()) if name not in now_there]
        return [name for name in names if not is_empty(Run(self.run.path / name))]

    def turn_after(self, job: Job) -> list[str]:
        """The jobs whose end, however they end, makes it the turn of the trial that begins with ``job``."""
        mine = {other.name for other in self.to_do if other.trial == job.trial}
        if job.trial is None or mine.intersection(job.needs):
            return []
        found = []
        for trial in self.behind.get(job.trial, ()):
            left = [other for other in self.jobs if other.trial == trial and self.actions[other.name] != "skip"]
            needed = {need for other in left for need in other.needs}
            found += [other.name for other in left if other.name not in needed]
        return found

    def missing_parts(self, job: Job) -> list[int]:
        """The tasks of an array's job that are to do. (What is done anew is set aside only when all else is ready.)"""
        return list(range(job.array)) if self.actions[job.name] == "rerun" else job.missing_parts()

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Inside, the run says what this launch does, and what is done anew is set aside. Undone if the block fails."""
        for job in self.jobs:
            path = self.run.config_path(job.name)
            if self.actions[job.name] not in UNTOUCHED or not path.exists():
                self.changes.write(path, as_yaml(job.config))
            if self.actions[job.name] == "rerun":
                self.changes.set_aside(job.run.path)
        self.changes.write(self.run.pipeline_path, as_yaml(self.pipeline))
        self.changes.write(self.run.record_path, self.record.model_dump_json(indent=1) + "\n")
        with self.changes.made() as moved:
            yield
        for old, new in moved:
            console.print(f"{old} is now {new}")


class Executor(Protocol):
    """Where jobs are done."""

    def check(self) -> None:
        """UsageError where this machine cannot give it jobs."""

    def check_jobs(self, launch: Launch) -> None:
        """UsageError where it can never do what the launch asks of it."""

    def run(self, launch: Launch) -> int:
        """Does the jobs that the launch is ``to_do``, or sees to it that they will be done, inside ``committed`` or
        after it. Returns an exit status. Raises with everything as it was."""

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
    as_json: bool = False,
) -> int:
    """Has the ``jobs`` done that are missing or unfinished, each after those it needs. Returns an exit status.

    ``as_json``: prints what was done with each job as JSON; what else there is to say goes to standard error.
    """
    executor = executor or executor_of(cluster)
    executor.check()
    run = PipelineRun(pipeline.run)
    _refuse(run, pipeline)
    with _nothing_left(run), locked(run.path):
        planned = prepare(pipeline, jobs, cluster, rerun, cluster_name)
        if left := planned.left:
            names = f"{', '.join(left[:MOST_NAMED])}{', ...' * (len(left) > MOST_NAMED)}"
            print(f"no longer part of it, but kept in {run.path}: {names}", file=sys.stderr)
        if snapshot(run.code) != planned.code:
            raise UserError("the code was edited while it was copied; launch again")
        try:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                if planned.to_do and planned.before and planned.before.code != planned.code.name:
                    change = f"{planned.before.code} → {planned.code.name}"
                    console.print(f"the code has changed since the last launch ({change})")
                code = executor.run(planned)
        finally:
            planned.changes.forget()
    if as_json:
        print(json.dumps(_told(planned), indent=1))
    return code


def _told(launch: Launch) -> dict[str, Any]:
    def about(job: Job) -> dict[str, Any]:
        folder = launch.run.slurm
        new = launch.record.jobs[job.name].submitted if launch.actions[job.name] != "skip" else []
        submitted = [one.model_dump() | {"script": str(one.script(folder, job.name))} for one in new]
        status = job.run.status()
        state = status.state if status else None
        return {"action": launch.actions[job.name], "state": state, "run": str(job.run.path), "submitted": submitted}

    return {
        "run": str(launch.run.path),
        "cluster": launch.record.cluster_name,
        "code": str(launch.code),
        "jobs": {job.name: about(job) for job in launch.jobs},
    }


def prepare(
    pipeline: PipelineConfig,
    jobs: Sequence[Job],
    cluster: ClusterConfig,
    rerun: Collection[str] = (),
    cluster_name: str = "local",
) -> Launch:
    """What a launch would do. Writes nothing. UsageError where it would touch the work of another config."""
    run = PipelineRun(pipeline.run)
    _refuse(run, pipeline)
    before = run.record()
    queued = still_to_do(run, before) if before else {}
    if queued and not isinstance(cluster, SlurmCluster):
        raise UsageError(
            f"{run.path}: SLURM has {', '.join(queued)} of it queued or running; wait, launch it with --cluster "
            f"{before.cluster_name}, or first: stpredict cancel {run.path}"
        )
    if gone := queued.keys() - {job.name for job in jobs}:
        raise UsageError(
            f"{run.path}: job {min(gone)!r} is queued or running, but no longer in the pipeline; first: "
            f"stpredict cancel {run.path}"
        )
    actions = plan(jobs, rerun, {name: before.jobs[name].fingerprint for name in queued})
    code = place_of(run.code)
    behind = _behind(pipeline, jobs, actions, before)
    if before:
        _refuse_renamed(run, jobs, actions, before)
    record = Record(
        pipeline=pipeline.name,
        cluster_name=cluster_name,
        cluster=cluster,
        code=code.name,
        launched=now(),
        directory=str(Path.cwd()),
        jobs={job.name: _job_record(job, actions[job.name], before, behind) for job in jobs},
    )
    return Launch(pipeline, run, jobs, actions, record, code, before, behind)


def _refuse_renamed(run: PipelineRun, jobs: Sequence[Job], actions: Mapping[str, Action], before: Record) -> None:
    """UsageError where what is to run stands there under the name that it had in the last launch."""
    now_there = {job.name for job in jobs}
    gone = {old.fingerprint: name for name, old in before.jobs.items() if name not in now_there}
    missing = {
        gone[job.fingerprint]: job.name for job in jobs if actions[job.name] == "run" and job.fingerprint in gone
    }
    renamed = [(run.path / old, run.path / new) for old, new in missing.items() if not is_empty(Run(run.path / old))]
    if renamed:
        moves = "; ".join(f"mv -T {quote(str(old))} {quote(str(new))}" for old, new in renamed)
        raise UsageError(
            f"{run.path}: what {len(renamed)} job{'s' * (len(renamed) > 1)} would make is there under another name, "
            f"from before the grid or the pipeline was changed; rename, or give another `run`: {moves}"
        )


def _behind(
    pipeline: PipelineConfig, jobs: Sequence[Job], actions: Mapping[str, Action], before: Record | None
) -> dict[str, tuple[str, ...]]:
    """Which trials that are to do wait for which others, where only ``at_once`` run at once. Those that SLURM has
    already keep their places."""
    queued: dict[str, set[str]] = {}
    for job in jobs:
        if job.trial and actions[job.name] == "queued":
            queued.setdefault(job.trial, set()).update(before.jobs[job.name].behind)
    new = dict.fromkeys(job.trial for job in jobs if job.trial and actions[job.name] not in UNTOUCHED)
    return lanes([trial for trial in new if trial not in queued], pipeline.at_once, queued)


def _refuse(run: PipelineRun, pipeline: PipelineConfig) -> None:
    if Run(run.path).config_path.is_file() and not run.pipeline_path.is_file():
        raise UsageError(f"{run.path} is the run of one job; give another `run` for the pipeline")
    refuse_foreign(run.path, "pipeline.yaml", {LAUNCHER, *pipeline.jobs})
    if run.name() not in (None, pipeline.name):
        raise UsageError(
            f"{run.path} is the run of pipeline {run.name()!r}, not of {pipeline.name!r}; give another `run`"
        )


def _job_record(job: Job, action: Action, before: Record | None, behind: Mapping[str, tuple[str, ...]]) -> JobRecord:
    old = before.jobs.get(job.name) if before and action != "rerun" else None
    return JobRecord(
        needs=job.needs,
        after=job.after,
        fingerprint=job.fingerprint,
        array=job.array,
        trial=job.trial,
        behind=old.behind if old and action == "queued" else behind.get(job.trial, ()),
        submitted=list(old.submitted) if old else [],
    )


@contextmanager
def _nothing_left(run: PipelineRun) -> Iterator[None]:
    """What a launch that fails before it is committed leaves behind: nothing that was not there."""
    folders = [path for path in (run.path, *run.path.parents) if not path.exists()]
    began = (run.path / LAUNCHER).exists()
    codes, record = set(run.code.glob("*")), _content(run.record_path)
    try:
        yield
    except BaseException as error:
        if _content(run.record_path) != record:
            raise
        for code in set(run.code.glob("*")) - codes:
            shutil.rmtree(code, ignore_errors=True)
        if not began:
            shutil.rmtree(run.path / LAUNCHER, ignore_errors=True)
        if folders:
            (run.path / ".lock").unlink(missing_ok=True)
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(
                f"{error.filename or run.path}: {FULL[error.errno]}; nothing was launched: make room there, or give "
                "another `run`"
            ) from None
        raise


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
