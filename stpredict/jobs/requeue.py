"""What becomes of a job that was asked to stop: under SLURM it requeues itself, with the same id. Torch-free."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Mapping

from stpredict.training.signals import AGAIN

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
        return f"{AGAIN} (in a SLURM job of one task, only SIGUSR2 requeues)"
    if shutil.which("scontrol") is None:
        return f"SLURM job {job} is not requeued, since there is no scontrol here: {AGAIN}"
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        try:
            # SLURM would requeue a cancelled job too, as long as its processes are ending.
            about = _scontrol("--oneliner", "show", "job", job)
            state = re.search(r"\bJobState=(\w+)", about)
            if state and state[1] != "RUNNING":
                return f"SLURM job {job} is not requeued, since it was cancelled or is over ({state[1]}): {AGAIN}"
            if re.search(r"\bBatchFlag=0\b", about):
                return f"SLURM job {job} is not requeued, since it is interactive: {AGAIN}"
            if re.search(r"\bRequeue=0\b", about):
                return f"SLURM job {job} is not requeued, since it was submitted with --no-requeue: {AGAIN}"
            _scontrol("requeue", job)
            return f"SLURM job {job} is requeued and continues by itself"
        except subprocess.CalledProcessError as error:
            problem = error.stderr.strip()
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error)
    return f"SLURM job {job} is not requeued: {problem or 'scontrol failed'}: {AGAIN}"


def job_id(environment: Mapping[str, str]) -> str | None:
    """The SLURM job's id as scontrol takes it; of an array's task ARRAY_TASK, since one of the tasks has the array's
    own id as its SLURM_JOB_ID."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
