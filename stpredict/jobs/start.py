"""Runs one job in this process, as one of its ranks: logging, status file, errors, exit status. Torch-free."""

import importlib
import logging
import os
import socket
import sys

from data_pipeline.errors import UserError
from stpredict.jobs.config import JobConfig
from stpredict.run import Run, now
from stpredict.training.signals import Preempted

log = logging.getLogger(__name__)

# The module of each kind of job; its ``run(config, run)`` fills the run directory.
MODULES = {
    "shard": "stpredict.jobs.shard",
    "tokenizer": "stpredict.jobs.train",
    "prior": "stpredict.jobs.train",
    "encode": "stpredict.jobs.encode",
    "generate": "stpredict.jobs.generate",
    "evaluate": "stpredict.jobs.evaluate",
    "report": "stpredict.jobs.report",
}
EXIT_PREEMPTED = 75


def start(config: JobConfig) -> int:
    """Runs the job as rank ``RANK`` (0 where there is none). Returns 0, 1, 2, or 75: stopped early, resumable."""
    rank = int(os.environ.get("RANK", 0))
    run = Run(config.run)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", stream=sys.stderr, force=True
    )
    if rank == 0:
        run.update_status(
            kind=config.kind,
            state="running",
            started=now(),
            finished=None,
            error=None,
            host=socket.gethostname(),
            pid=os.getpid(),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        )
        run.write_environment()
    try:
        importlib.import_module(MODULES[config.kind]).run(config, run)
    except Exception as error:
        return _failed(run, rank, error)
    if rank == 0:
        run.update_status(state="done", finished=now(), phase="")
    return 0


def _failed(run: Run, rank: int, error: Exception) -> int:
    if isinstance(error, Preempted):
        log.warning("%s", error)
        if rank == 0:
            run.update_status(state="preempted", finished=now(), error=str(error))
        return EXIT_PREEMPTED
    mendable = isinstance(error, UserError)
    log.error("%s", error, exc_info=None if mendable and not os.environ.get("STPREDICT_DEBUG") else error)
    status = run.status()
    if status is None or status.state != "failed":  # the first rank to fail knows why; the others fail after it
        text = str(error) if mendable else f"{type(error).__name__}: {error}"
        run.update_status(state="failed", finished=now(), error=text.splitlines()[0] if text else repr(error))
    return error.exit_status if mendable else 1
