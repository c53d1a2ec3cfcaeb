"""What SLURM is still to do of an earlier launch: a later one leaves it alone, and depends upon it."""

import time

from data_pipeline.errors import UsageError
from launcher.record import JobRecord, PipelineRun, Record, Submitted
from launcher.slurm import queue
from stpredict.jobs.config import PARTS
from stpredict.run import Run

SETTLE_S = 20.0  # a job that is ending is soon gone, or waiting to start again
NEVER = "DependencyNeverSatisfied"  # SLURM is about to cancel it


def still_to_do(run: PipelineRun, before: Record) -> dict[str, list[str]]:
    """Job → its SLURM jobs that will still finish it. UsageError where some of an array's tasks still run, but others
    have ended without finishing theirs."""
    if not queue.here():
        return {}
    alive = _settled(before)
    found: dict[str, list[str]] = {}
    for name, job in before.jobs.items():
        ids = [one.slurm_id for one in job.submitted if one.slurm_id in alive]
        doomed = [need for need in job.needs if need not in found and not _is_done(run, need)]
        if not ids or doomed:  # SLURM cancels what can never start
            continue
        ended = [one for one in job.submitted if one.slurm_id not in alive and not _did(run, name, job, one)]
        if ended and all(one.merge for one in job.submitted if one.slurm_id in alive):
            continue  # nor can a merge without all of its parts
        if ended:
            what = ", ".join("its merge" if one.merge else f"task {one.part}" for one in ended)
            raise UsageError(
                f"job {name!r}: {what} ended without finishing, while others of it are queued or running; launch "
                f"again when they have ended, or first: stpredict cancel {run.path}"
            )
        found[name] = ids
    return found


def _settled(before: Record) -> set[str]:
    end = time.monotonic() + SETTLE_S
    while True:
        jobs = queue.queued_of(before)
        if not any(job.state == "COMPLETING" for job in jobs.values()) or time.monotonic() > end:
            return {id for id, job in jobs.items() if job.reason != NEVER}
        time.sleep(0.5)


def _did(run: PipelineRun, name: str, job: JobRecord, one: Submitted) -> bool:
    return _is_done(run, name) or (one.part is not None and _is_done(run, f"{name}/{PARTS}/{one.part}-of-{job.array}"))


def _is_done(run: PipelineRun, folder: str) -> bool:
    status = Run(run.path / folder).status()
    return status is not None and status.state == "done"
