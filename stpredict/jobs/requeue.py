"""What becomes of a job that was asked to stop: under SLURM it requeues itself, with the same id. Torch-free."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Mapping

from stpredict.training.signals import AGAIN, sparing_children

TRIES = 3  # a busy controller answers late or not at all
PAUSE_S = 5.0
TIMEOUT_S = 30.0


def requeue(received: Collection[signal.Signals]) -> str:
    """Requeues the SLURM job that this process is in, if it is in one and was not cancelled. Returns what happens
    next, in words; raises nothing.

    To be called by one rank only, when everything is on disk and before any rank ends: SLURM then ends what is left of
    the job. ``received`` are the stop signals that came to this rank.
    """
    job = job_id(os.environ)
    if job is None:
        return AGAIN
    # Where SLURM did not start several ranks itself, a SIGTERM may be from a person or the launcher: Ctrl-C in a
    # notebook's job, say, which must not be requeued.
    if signal.SIGUSR2 not in received and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        if requeued := already_requeued():
            return requeued
        return f"{AGAIN} (in a SLURM job of one task, only SIGUSR2 requeues)"
    if shutil.which("scontrol") is None:
        return f"SLURM job {job} is not requeued, since there is no scontrol here: {AGAIN}"
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        try:
            about = _about(job)
            if _is_requeued(about):
                return continues(job)
            if why := _why_not(about, received):
                return f"SLURM job {job} is not requeued, since {why}: {AGAIN}"
            _scontrol("requeue", job)
            return continues(job)
        except subprocess.CalledProcessError as error:
            problem = error.stderr.strip()
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error)
    return f"SLURM job {job} is not requeued: {problem or 'scontrol failed'}: {AGAIN}"


def already_requeued() -> str | None:
    """What happens next, if SLURM ends this process's job in order to start it again (preemption, `scontrol requeue`);
    None if not, or if SLURM does not say."""
    job = job_id(os.environ)
    try:
        return continues(job) if job and shutil.which("scontrol") and _is_requeued(_about(job)) else None
    except (OSError, subprocess.SubprocessError):
        return None


def continues(job: str) -> str:
    return f"SLURM job {job} is requeued and continues by itself"


def job_id(environment: Mapping[str, str]) -> str | None:
    """The SLURM job's id as scontrol takes it; of an array's task ARRAY_TASK, since one of the tasks has the array's
    own id as its SLURM_JOB_ID."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def _about(job: str) -> dict[str, str]:
    """What scontrol tells of a job: JobState, Restarts, Reason, ..."""
    return dict(re.findall(r"\b(\w+)=(\S+)", _scontrol("--oneliner", "show", "job", job)))


def _is_requeued(about: Mapping[str, str]) -> bool:
    """Whether SLURM counts another start already than this one."""
    return int(about.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _why_not(about: Mapping[str, str], received: Collection[signal.Signals]) -> str | None:
    """What speaks against requeueing a job that scontrol tells this of. SLURM itself would requeue a cancelled one, as
    long as its processes are ending."""
    if about.get("BatchFlag") == "0":
        return "it is interactive"
    if about.get("Requeue") == "0":
        return "it was submitted with --no-requeue"
    if about.get("JobState") in ("RUNNING", "SIGNALING"):  # the signal is still on its way to other nodes
        return None
    if about.get("Reason") == "TimeLimit":  # after a SIGUSR2 the save took too long; otherwise nobody asked for more
        return None if signal.SIGUSR2 in received else "its time is over (sbatch --signal=USR2@… requeues it)"
    return f"SLURM is ending it already, as after scancel ({about.get('JobState')})"


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    with sparing_children():  # once requeued, the job gets a SIGTERM, and so does the scontrol that asked for it
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
