"""How SLURM jobs ended that squeue has forgotten: sacct, where the cluster keeps accounts."""

import shutil
import subprocess
from collections.abc import Collection

from data_pipeline.errors import UserError
from launcher.slurm import queue

TIMEOUT_S = 30.0
NO_ACCOUNTS = "accounting storage is disabled"  # what sacct says where there is no slurmdbd


def ended(ids: Collection[str]) -> dict[str, str]:
    """Of the jobs ``ids`` those that the accounts know as ended: id → TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, CANCELLED, ...
    Empty where no accounts are kept; UserError where they are and do not answer."""
    if not ids or shutil.which("sacct") is None:
        return {}
    question = ["--noheader", "--parsable2", "--allocations", "--allusers", "--format=JobID,State"]
    question.append(f"--jobs={','.join(sorted(ids))}")
    try:
        answer = queue.run("sacct", *question, timeout_s=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"sacct: no answer in {TIMEOUT_S:g} s") from None
    if NO_ACCOUNTS in answer.stderr:
        return {}
    if answer.returncode:
        raise UserError(f"sacct: {' '.join(answer.stderr.split()) or f'ended with {answer.returncode}'}")
    return parse(answer.stdout, ids)


def parse(out: str, wanted: Collection[str]) -> dict[str, str]:
    """Lines like ``5_1|CANCELLED by 1000``; of a job that was requeued the last line counts."""
    rows = (line.split("|") for line in out.splitlines() if "|" in line)
    found = {name: state.split()[0] for name, state, *_ in rows if name in wanted and state}
    return {name: state for name, state in found.items() if state not in ("PENDING", "RUNNING", "REQUEUED", "RESIZING")}
