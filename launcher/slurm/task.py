"""What submitit calls in every task of a SLURM job of ours: one rank of the job. Torch-free up to the job itself."""

import os
import signal
import sys
from pathlib import Path

from data_pipeline.errors import UsageError, UserError
from launcher import ranks
from launcher.jobs import join
from launcher.parts import merge as merge_parts
from launcher.rank import leave
from launcher.record import PipelineRun, part_config
from stpredict.run import Run
from stpredict.training.signals import StopRequest


def work(folder: str, job: str, part: int | None, merge: bool) -> None:
    """One rank of ``job``, or of its ``part``, of the pipeline's run ``folder``; or the ``merge`` of all its parts.

    Ends the process with the job's exit status. It has no ``checkpoint`` method, and in place of submitit's handlers of
    signals come ours: submitit would requeue the job before the ranks have saved together.
    """
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # SLURM sends one before each SIGTERM; submitit's logs a warning
    with StopRequest():
        try:
            leave(_work(PipelineRun(Path(folder)), job, part, merge))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(error.exit_status)


def _work(run: PipelineRun, name: str, part: int | None, merge: bool) -> int:
    record = run.record().jobs[name]
    _check_needs(run, name)
    if merge:
        merge_parts(run.path / name, record.fingerprint)
        return 0
    os.environ.update(ranks.slurm_step(os.environ, least=1))
    place = ranks.join()
    return join(part_config(run.config(name), part, record.array), place, record.fingerprint)


def _check_needs(run: PipelineRun, name: str) -> None:
    """UserError unless what the job reads is there, and UsageError unless it was made as the launch expected."""
    record = run.record()
    for need in record.jobs[name].needs:
        status = Run(run.path / need).status()
        if status is None or status.state != "done":
            found = f"whose state is {status.state}" if status else "which is not there"
            raise UserError(f"job {name!r} needs {run.path / need}, {found}; launch again")
        if status.fingerprint != record.jobs[need].fingerprint:
            raise UsageError(f"job {name!r} needs {run.path / need}, which was made with another config; launch again")
