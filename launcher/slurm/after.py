"""Decides what becomes of a SLURM job that did not end well: ``python -m launcher.slurm.after RUN JOB ...``, which
``after.sh`` calls on the first of the job's nodes, when its ranks have ended.

Exit status 0: SLURM is to start the job again, and on the nodes printed (which may be none) not. Anything else: the job
has failed. Either way the run's status.json says so. How often a job may fail is the cluster's ``retries``; being
stopped (preemption, time limit) does not count. Both counts begin anew with a new SLURM job.
"""

import argparse
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from data_pipeline.errors import UsageError, UserError
from launcher.config import SlurmCluster
from launcher.record import PipelineRun, home_of
from launcher.rundir import locked
from launcher.slurm.failure import Failure, batch_log, failures_path, read, this_start, was_asked, what_happened
from stpredict.jobs.requeue import continues, job_id
from stpredict.run import Run, now, slurm_start, write_atomically
from stpredict.training.signals import AGAIN

USABLE = {"idle", "mixed", "allocated", "completing", "planned", "reserved"}


class Failures(BaseModel):
    """How often a SLURM job has failed, and where it is not to start again (see ``failures_path``)."""

    errors: list[str] = []
    excluded: list[str] = []


class Verdict(NamedTuple):
    """Whether to start again, on which nodes not (None: as before), and what to tell a person."""

    again: bool
    excluded: tuple[str, ...] | None
    note: str | None


def decide(
    failure: Failure, failures: Failures, cluster: SlurmCluster, eligible: Collection[str], nodes: int
) -> Verdict:
    """Of a job on ``nodes`` nodes that failed before as in ``failures`` and now as in ``failure``. ``eligible`` are the
    nodes on which SLURM could start it, without those excluded already."""
    starts = cluster.retries + 1
    failed = len(failures.errors) + 1
    if failure.usage:
        return Verdict(False, None, "not started again, since it would fail the same way" if cluster.retries else None)
    if failed >= starts:
        return Verdict(False, None, f"failed {failed} times; {AGAIN}" if failed > 1 else None)
    follows = f"start {failed + 1} of {starts} follows"
    if failure.node is None:
        return Verdict(True, None, follows)
    if len(set(eligible) - {failure.node}) < nodes:
        return Verdict(True, None, f"{follows}, again with {failure.node}: too few nodes are left without it")
    return Verdict(True, (*failures.excluded, failure.node), f"{follows}, without {failure.node}")


def eligible_nodes(sinfo: str, partition: str, but: Collection[str]) -> set[str]:
    """Of the lines ``NODE STATE PARTITION`` those nodes of ``partition`` that work, but for those given."""
    rows = (line.split() for line in sinfo.splitlines() if line.strip())
    return {
        node
        for node, state, of in rows
        # "idle*" does not answer; "idle~" and the like are about power.
        if of.rstrip("*") == partition and re.fullmatch(r"([a-z]+)[~#%+-]?", state) and state.rstrip("~#%+-") in USABLE
    } - set(but)


def expand_nodes(nodes: str) -> list[str]:
    """SLURM's list of nodes, one by one: ``gpu[003-004,9],login`` → gpu003, gpu004, gpu9, login."""
    found = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^]]*)\])?([^,\[]*)", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last) + 1) if last else []
            found += [f"{prefix}{n:0{len(first)}}{suffix}" for n in numbers] or [f"{prefix}{first}{suffix}"]
    return found


def after(pipeline: PipelineRun, name: str, sinfo: str) -> Verdict:
    """Finds what happened, decides, and writes it down. UsageError where the run knows nothing of this SLURM job."""
    record, config, job = pipeline.record(), pipeline.config(name), job_id(os.environ)
    mine = next((one for one in record.jobs[name].submitted if one.slurm_id == job), None)
    if mine is None:
        raise UsageError(f"{pipeline.record_path}: SLURM job {job} is not one of {name!r} there; launch again")
    merge = mine.merge
    run = Run(config.run) if merge else home_of(config, mine.part, record.jobs[name].array)
    logs = pipeline.slurm_folder(mine.of(name))
    if was_asked(this_start(read(batch_log(logs, job)))):
        # The job asks for a new start itself, where it can: in a container there may be no scontrol.
        status = run.status()
        stopped = ((status and status.error) or "stopped").partition(";")[0]
        told = {"state": "preempted", "error": f"{stopped}; {continues(job)}"}
        _tell(run, record.jobs[name].fingerprint, config.kind, **told)
        return Verdict(True, None, None)
    path = failures_path(logs, job)
    failures = Failures.model_validate_json(path.read_text()) if path.exists() else Failures()
    ranks = 1 if merge else config.resources.processes
    failure = what_happened(run, ranks, slurm_start(os.environ), logs, job)
    cluster = record.cluster
    options = cluster.options_of("merge" if merge else config.kind, None if merge else config)
    but = [*expand_nodes(options.exclude or ""), *failures.excluded]
    eligible = eligible_nodes(sinfo, os.environ["SLURM_JOB_PARTITION"], but)
    verdict = decide(failure, failures, cluster, eligible, int(os.environ["SLURM_JOB_NUM_NODES"]))
    excluded = list(verdict.excluded or failures.excluded)
    write_atomically(
        path, Failures(errors=[*failures.errors, failure.error], excluded=excluded).model_dump_json(indent=1)
    )
    if verdict.again:
        told = {
            "state": "pending",
            "error": None,
            "note": f"failed: {failure.error}; {verdict.note}",
            "host": None,
            "pid": None,
        }
    else:
        told = {"state": "failed", "error": failure.error, "note": verdict.note, "finished": now()}
    _tell(run, record.jobs[name].fingerprint, config.kind, **told)
    print(f"after: {failure.error}; {verdict.note or 'it has failed'}", file=sys.stderr)
    if verdict.excluded is None:
        return verdict
    return verdict._replace(excluded=tuple(filter(None, [options.exclude, *verdict.excluded])))


def _tell(run: Run, fingerprint: str, kind: str, **changes: object) -> None:
    """Writes it into status.json, unless that speaks of another job's work: then the ranks were refused there."""
    try:
        with locked(run.path):
            status = run.status()
            if status is None or status.fingerprint == fingerprint:
                who = {"kind": kind, "fingerprint": fingerprint, "slurm_job_id": job_id(os.environ)}
                run.update_status(**who, **changes)
    except UserError as error:
        print(f"after: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("job")
    parser.add_argument("--nodes", required=True)
    given = parser.parse_args(arguments)
    try:
        verdict = after(PipelineRun(given.run), given.job, given.nodes)
    except UserError as error:
        print(f"after: error: {error}", file=sys.stderr)
        return error.exit_status
    if verdict.again:
        print(",".join(verdict.excluded or ()))
    return 0 if verdict.again else 1


if __name__ == "__main__":
    sys.exit(main())
