"""What SLURM knows of jobs, and what it is told: squeue, scancel, scontrol."""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import UsageError, UserError
from launcher.record import Record

TIMEOUT_S = 60.0
NO_CLUSTER = "SLURM's commands are here, but no cluster's slurm.conf; where it lies elsewhere, set SLURM_CONF to it"
FORMAT = "%i|%T|%r|%N|%j"
# Variables in which a person keeps options of these commands: SQUEUE_PARTITION would hide jobs of ours.
HABITS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_", "SACCT_", "SLURM_CLUSTERS")
# Of a job that has ended and will not start again.
OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}


class Queued(NamedTuple):
    """A job that SLURM has: its state (PENDING, RUNNING, COMPLETING, ...), why it is pending, its nodes, its name."""

    state: str
    reason: str = ""
    nodes: str = ""
    name: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER


def here() -> bool:
    """Whether this machine can ask SLURM."""
    return shutil.which("squeue") is not None


def known(ids: Iterable[str], user: int | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Queued]:
    """Of the jobs ``ids`` of ``user`` (a number; default: this one) those that are waiting, running or ending, and
    those that ended some minutes ago at most. Tasks of arrays are ARRAY_TASK. One question for all of them."""
    wanted = set(ids)
    if not wanted:
        return {}
    # Not --jobs: where SLURM has forgotten one of them, it may refuse to tell of the others.
    of = f"--user={os.getuid() if user is None else user}"
    question = ("--noheader", "--array", "--states=all", of, f"--format={FORMAT}")
    return parse(ask("squeue", *question, timeout_s=timeout_s), wanted)


def parse(out: str, wanted: Collection[str]) -> dict[str, Queued]:
    rows = (line.split("|", maxsplit=4) for line in out.splitlines())
    return {name: Queued(*rest) for name, *rest in rows if name in wanted}


def queued(ids: Iterable[str]) -> dict[str, Queued]:
    """Of the jobs ``ids`` of this user those that are waiting, running or ending."""
    return {name: job for name, job in known(ids).items() if not job.over}


def queued_of(record: Record) -> dict[str, Queued]:
    """Of the jobs that a launch submitted those that are waiting, running or ending. Their names are compared too:
    another SLURM may have given the same id to something else."""
    names = {
        one.slurm_id: record.slurm_name(one.of(name)) for name, job in record.jobs.items() for one in job.submitted
    }
    return {id: job for id, job in queued(names).items() if job.name == names[id]}


def cancel(ids: Collection[str]) -> None:
    if ids:
        ask("scancel", *ids)


def release(ids: Collection[str]) -> None:
    """Lets held jobs start."""
    if ids:
        ask("scontrol", "release", ",".join(ids))


def strays(folder: Path, known: Iterable[str]) -> list[str]:
    """Jobs with batch scripts below ``folder`` that are held and not ``known``: left by a launch that was killed, or
    by an sbatch whose answer was lost."""
    known = {id.partition("_")[0] for id in known}
    out = ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%F|%r|%o")
    rows = (line.split("|", 2) for line in out.splitlines())
    below = f"{folder.absolute()}/"
    found = {id for id, reason, script in rows if reason == "JobHeldUser" and script.startswith(below)}
    return sorted(found - known)


def warn(job: str) -> None:
    """Sends the job's ranks the signal that comes before its time limit."""
    ask("scancel", "--signal=USR2", job)


class NoClusterError(UsageError):
    """SLURM is installed here, and no cluster configured."""


def partition(name: str) -> dict[str, str]:
    """What SLURM says of a partition: MaxTime, PreemptMode, GraceTime, ..."""
    return dict(re.findall(r"\b(\w+)=(\S+)", ask("scontrol", "--oneliner", "show", "partition", name)))


def ask(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """What one of SLURM's commands prints. UserError with its words where it fails."""
    try:
        return run(*command, check=True, timeout_s=timeout_s).stdout
    except subprocess.CalledProcessError as error:
        if "configuration source" in error.stderr:
            raise NoClusterError(NO_CLUSTER) from None
        raise UserError(f"{command[0]}: {' '.join(error.stderr.split()) or f'ended with {error.returncode}'}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer from SLURM's controller in {timeout_s:g} s; try again") from None


def run(*command: str, check: bool = False, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """One of SLURM's commands, whatever a person's habits are."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(HABITS)}
    bare = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "env": environment}
    return subprocess.run(command, check=check, timeout=timeout_s, **bare)
