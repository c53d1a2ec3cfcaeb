"""``stpredict cancel``: ends what is launched of a run, in SLURM or here, and says what is saved."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from shlex import quote

from pydantic import BaseModel
from rich.console import Console

from data_pipeline.errors import UsageError, UserError
from launcher import rundir
from launcher.config import SlurmCluster
from launcher.overview import Row, Slurm, rows, runs_of
from launcher.parts import part_runs
from launcher.record import PipelineRun, Record, pipeline_of
from launcher.slurm import queue
from stpredict.run import Run, now
from stpredict.training.checkpoint import complete_checkpoints, step_of

ENDS_S = 180.0  # SLURM's KillWait is 30 s by default, the local executor's grace 60 s
AGAIN_S = 20.0  # a job that requeued itself at that very moment is in the queue again
ASK_EVERY_S = 2.0

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Cancelled(BaseModel):
    """What became of a job that was waiting or running: its state now, the SLURM jobs that were cancelled, what the job
    itself said of its end, and the step of its newest checkpoint."""

    job: str
    state: str
    reason: str | None = None
    slurm_ids: list[str] = []
    said: str | None = None
    checkpoint: int | None = None


def cancel(path: Path) -> list[Cancelled]:
    """Ends all jobs of the run ``path`` that wait or run; returns them when they have ended. UserError where SLURM does
    not answer, or where one does not end.

    A job that SLURM has for a pipeline is known from what was launched, so that it can be cancelled before it began.
    """
    is_pipeline = (path / "pipeline.yaml").is_file()
    whole, only = path, None
    if not is_pipeline and (found := pipeline_of(path)) and isinstance(found[1].cluster, SlurmCluster):
        whole, only = found[0], path.absolute().name
    run = PipelineRun(whole)
    with ExitStack() as stack:
        record = run.record() if is_pipeline or only else None
        if record and isinstance(record.cluster, SlurmCluster):
            stack.enter_context(rundir.locked(whole))  # nobody launches meanwhile
            record = run.record()
        slurm = Slurm()
        before = [row for row in rows(whole, slurm) if row.live and only in (None, row.job)]
        if not slurm.answered and any(row.slurm_ids for row in before):
            raise UserError(f"{slurm.note.partition(': these are')[0]}: nothing is cancelled")
        alive = _alive(record, before, only)
        processes = _processes(path, None if only else record)
        if not alive and not processes:
            return []
        _tell(alive, processes)
        if record and not only:
            record.cancelled = now()
            run.write_record(record)
        _wait_for_end(lambda: _alive(record, before, only) if alive else set(), processes)
    after = {row.job: row for row in rows(whole, slurm)}
    in_pipeline = record is not None
    return [_what_became(row, after[row.job], alive, _folder(whole, in_pipeline, row)) for row in before]


def _alive(record: Record | None, jobs: list[Row], only: str | None = None) -> set[str]:
    """The SLURM jobs of a run, or of the job ``only``, that have not ended."""
    if not queue.here():
        return set()
    if record:
        wanted = {one.slurm_id for name, job in record.jobs.items() if only in (None, name) for one in job.submitted}
        return wanted & queue.queued_of(record).keys()
    return set(queue.queued(id for row in jobs for id in row.slurm_ids))


def _processes(path: Path, record: Record | None) -> dict[int, Path]:
    """The launchers here that do it without SLURM, and what each of them holds. UsageError where one is elsewhere."""
    if record and isinstance(record.cluster, SlurmCluster):
        return {}
    begun = Run(path).status_path.is_file() or part_runs(path)
    folders = [run.path for run in runs_of(path).values()] if begun else [path]
    found = {}
    for folder in folders:
        owner = rundir.OWNER.fullmatch(rundir.owner(folder) or "")
        if owner is None or owner["start"]:
            continue
        if owner["host"] != socket.gethostname():
            raise UsageError(f"{folder} is being made by process {owner['pid']} on {owner['host']}: cancel it there")
        found[int(owner["pid"])] = folder
    return found


def _tell(alive: set[str], processes: dict[int, Path]) -> None:
    queue.cancel(alive)
    for pid in processes:
        with suppress(ProcessLookupError):  # it was killed, and its ranks are about to end
            os.kill(pid, signal.SIGTERM)
    what = [
        *([f"{len(alive)} SLURM job{'s' * (len(alive) > 1)}"] if alive else []),
        *([f"process {', '.join(map(str, processes))}"] if processes else []),
    ]
    console.print(f"cancelling {' and '.join(what)}; jobs that can save do so before they end")


def _wait_for_end(alive: Callable[[], set[str]], processes: dict[int, Path]) -> None:
    def left() -> list[str]:
        held = [f"process {pid}" for pid, folder in processes.items() if rundir.owner(folder)]
        return [*sorted(alive()), *held]

    _wait(left, again=lambda: queue.cancel(alive()))


def _wait(left: Callable[[], list[str]], again: Callable[[], None]) -> None:
    began = asked_again = time.monotonic()
    with console.status("ending") as line:
        while names := left():
            line.update(f"still ending: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
            at = time.monotonic()
            if at - began > ENDS_S:
                raise UserError(f"after {ENDS_S:g} s these have not ended: {', '.join(names)}; see squeue, or ps")
            if at - asked_again > AGAIN_S:
                asked_again = at
                again()
            time.sleep(ASK_EVERY_S)


def _folder(path: Path, is_pipeline: bool, row: Row) -> Path:
    return path / row.job if is_pipeline else runs_of(path)[row.job].path


def _what_became(before: Row, after: Row, alive: set[str], folder: Path) -> Cancelled:
    saved = complete_checkpoints(Run(folder).checkpoints)
    began = before.state not in ("queued", "starting", "submitted")
    said = after.status.error.partition(";")[0] if began and after.status and after.status.error else None
    return Cancelled(
        job=after.job,
        state=after.state,
        reason=after.reason,
        slurm_ids=[id for id in before.slurm_ids if id in alive],
        said=said,
        checkpoint=step_of(saved[-1]) if saved else None,
    )


def as_text(jobs: list[Cancelled], path: Path) -> list[str]:
    """Lines for a person; the jobs that are alike share one."""
    lines: dict[str, list[str]] = {}
    for job in jobs:
        saved = f"; its newest checkpoint is of step {job.checkpoint}" if job.checkpoint is not None else ""
        how = job.said or job.state + (f" ({job.reason})" if job.reason else "")
        lines.setdefault(f"{how}{saved}", []).append(job.job)
    told = [f"{', '.join(names)}: {said}" for said, names in lines.items()]
    if (found := pipeline_of(path)) is None:
        return [*told, f"go on: stpredict resume {quote(str(path))}"]
    folder, record = found
    if dependents := _dependents(record, path.absolute().name):
        told.append(f"{', '.join(dependents)}: not started, for want of it")
    return [*told, f"go on: stpredict resume {quote(str(folder))}"]


def _dependents(record: Record, job: str) -> list[str]:
    """The jobs that need ``job``, or one of those that do."""
    found = [job]
    for name, other in record.jobs.items():  # each after those that it needs
        if set(other.needs) & set(found):
            found.append(name)
    return found[1:]
