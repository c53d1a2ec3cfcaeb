"""What happened in a start of a SLURM job that did not end well: which rank went first, on which node, and why.

A rank that could says it itself, in its .error file. Of one that died without a word (SIGKILL, a segmentation fault) or
never became a rank, srun tells in the batch script's log; the lines of this start come after its first, ``BEGIN``.
"""

import re
from pathlib import Path
from typing import NamedTuple

from stpredict.jobs.start import EXIT_PREEMPTED
from stpredict.run import Run

# A line of the batch script, before everything else.
BEGIN = 'echo "=== start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST" >&2'
BAD_USAGE = 2
ENDED = re.compile(r"srun: error: (\S+): tasks? (\d+)\S*: (.+)")
NOT_BEGUN = re.compile(r"srun: error: .*failed on node ([\w.-]+)")  # Task launch for StepId=1.0 failed on node N: why
NOT_FOUND = re.compile(r"slurmstepd\S*: error: (execve\(\): .+)")
SAID_BY_SLURM = re.compile(r"srun: |slurmstepd(?!\S*: error: execve)|===|Terminated$|submitit ")
ASKED = ("Terminated", "User defined signal 2", f"Exited with exit code {EXIT_PREEMPTED}")  # by srun; before a handler
WORDS = {
    "Killed": "was killed (SIGKILL: out of memory?)",
    "Out Of Memory": "was killed, since its job used more memory than it asked for",
}


class Failure(NamedTuple):
    """``node`` is that of the rank that failed first, where it is known; ``usage``: another start would fare no
    better."""

    error: str
    node: str | None = None
    usage: bool = False


class Ended(NamedTuple):
    """The first of some ranks that ended alike, in srun's words: ``how`` is "Killed", "Exited with exit code 1"."""

    node: str
    rank: int
    how: str


def this_start(log: str) -> str:
    """The part of a batch script's log that the last start wrote."""
    return re.split(r"^=== start .*$", log, flags=re.MULTILINE)[-1]


def endings(log: str) -> list[Ended]:
    """What srun says of ranks that did not end well, in the order in which they ended."""
    return [Ended(node, int(rank), how.strip()) for node, rank, how in ENDED.findall(log)]


def was_asked(log: str) -> bool:
    """Whether all ranks that did not end well did so because the job was to stop."""
    return all(ended.how in ASKED for ended in endings(log)) and bool(endings(log))


def what_happened(run: Run, ranks: int, start: str, logs: Path, job: str) -> Failure:
    """Of ``start`` (see ``slurm_start``) of the SLURM job ``job`` with so many ``ranks``, which fills ``run`` and has
    submitit's logs in ``logs``."""
    text = this_start(read(batch_log(logs, job)))
    ended = [one for one in endings(text) if one.how not in ASKED]
    errors = [(rank, error) for rank, error in run.errors(range(ranks)) if error.start == start]
    silent = ended and not ended[0].how.startswith("Exited")  # a death by signal explains the others' errors
    if errors and not silent:
        rank, error = errors[0]
        usage = any(error.exit_status == BAD_USAGE for _, error in errors)
        log = run.log_path(rank)
        return Failure(f"{error.error} (rank {rank} on {error.node}; log: {log})", error.node, usage)
    if ended:
        return _wordless(ended, logs, job)
    log = batch_log(logs, job)
    node = NOT_BEGUN.search(text)
    said = re.search(r"srun: error: (.+)", text)
    words = said[1] if said else _last_line(text) or "ended without a word"
    return Failure(f"{words} (log: {log})", node and node[1])


def _wordless(ended: list[Ended], logs: Path, job: str) -> Failure:
    node, rank, how = ended[0]
    log = rank_log(logs, job, rank)
    last = _last_line(read(log))
    not_found = NOT_FOUND.match(last)
    code = re.fullmatch(r"Exited with exit code (\d+)", how)
    said = f"rank {rank} on {node} {f'ended with status {code[1]}' if code else WORDS.get(how, f'died: {how}')}"
    if last and how not in WORDS:  # what is killed says nothing; its data workers do, and that they lost it
        said += f"; last in its log: {not_found[1] if not_found else last}"
    # Where Python was not found, the status is 2 as well; on another node it may be there.
    usage = not not_found and any(one.how == f"Exited with exit code {BAD_USAGE}" for one in ended)
    return Failure(f"{said} (log: {log})", node if re.fullmatch(r"[\w.-]+", node) else None, usage)


def batch_log(logs: Path, job: str) -> Path:
    """srun's words, and rank 0's."""
    return rank_log(logs, job, 0)


def failures_path(logs: Path, job: str) -> Path:
    """How often the SLURM job has failed so far."""
    return logs / f"{job}.failures.json"


def rank_log(logs: Path, job: str, rank: int) -> Path:
    return logs / f"{job}_{rank}_log.err"


def read(log: Path) -> str:
    """The log's end; "" where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 1_000_000))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _last_line(text: str) -> str:
    """The last line of the program itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not SAID_BY_SLURM.match(line)]
    return lines[-1].removeprefix("error: ") if lines else ""
