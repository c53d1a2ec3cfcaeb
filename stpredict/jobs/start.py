"""Runs one job in this process, as one of its ranks: logging, status file, errors, exit status. Torch-free."""

import errno
import importlib
import logging
import os
import socket
from signal import SIGUSR2

from data_pipeline.errors import UsageError, UserError
from stpredict.jobs.config import JobConfig
from stpredict.jobs.rank_log import log_to
from stpredict.jobs.requeue import already_requeued, job_id, requeue
from stpredict.run import Run, State, now
from stpredict.training.signals import AGAIN, Preempted, StopRequest

log = logging.getLogger(__name__)

# The module of each kind of job; its ``run(config, run)`` fills the run directory.
MODULES = {
    "shard": "stpredict.jobs.shard",
    "tokenizer": "stpredict.jobs.train",
    "prior": "stpredict.jobs.train",
    "forecaster": "stpredict.jobs.train",
    "encode": "stpredict.jobs.encode",
    "generate": "stpredict.jobs.generate",
    "reconstruct": "stpredict.jobs.reconstruct",
    "forecast": "stpredict.jobs.forecast",
    "evaluate": "stpredict.jobs.evaluate",
    "report": "stpredict.jobs.report",
    "study_report": "stpredict.jobs.study_report",
}
# The command for each kind of job that is not called like its command.
COMMANDS = {
    "tokenizer": "train",
    "prior": "train",
    "forecaster": "train",
    "reconstruct": "generate",
    "forecast": "generate",
}
# Jobs that save at a step boundary when they are asked to stop. The others are left wherever they are: what they have
# finished is kept.
SAVING = {"tokenizer", "prior", "forecaster"}
# Of the others, those that keep nothing of what they have not finished; out of time, each start is like the one before.
STARTING_OVER = {"generate", "reconstruct", "forecast", "evaluate", "report", "study_report"}
MOST_STARTS = 4
EXIT_PREEMPTED = 75
FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}


def command_of(kind: str) -> str:
    """The command that runs a job of ``kind``."""
    return COMMANDS.get(kind, kind)


def start(config: JobConfig, shared_terminal: bool = False) -> int:
    """Runs the job as rank ``RANK`` (0 where there is none). Returns 0, 1, 2, or 75: stopped early, resumable.

    ``shared_terminal``: standard error is not this rank's alone, nor a file (see ``rank_log``).
    Only rank 0 writes status.json; why another rank failed stands in its logs/rank_N.error.
    """
    rank = int(os.environ.get("RANK", 0))
    run = Run(config.home)
    log_to(run, rank, int(os.environ.get("WORLD_SIZE", 1)), shared_terminal)
    with StopRequest() as stop:  # from here on: a signal while torch is imported would end the process
        try:
            run.error_path(rank).unlink(missing_ok=True)
            if rank == 0:
                _begin(config, run)
            if config.kind in SAVING:
                _work(config, run)
            else:
                _work_until(stop, config, run, rank)
            if rank == 0:
                run.update_status(state="done", finished=now(), phase="")
        except Preempted as stopped:
            log.warning("%s", stopped)
            _leave_word(run, rank, "preempted", str(stopped))
            return EXIT_PREEMPTED
        except Exception as error:
            return _failed(run, rank, error)
    return 0


def _work(config: JobConfig, run: Run) -> None:
    importlib.import_module(MODULES[config.kind]).run(config, run)


def _work_until(stop: StopRequest, config: JobConfig, run: Run, rank: int) -> None:
    """Does the job, or leaves it, without a word to the other ranks: they got the signal too."""
    try:
        with stop.raising():
            return _work(config, run)
    except (Preempted, Exception) as error:
        if not stop:
            raise
        if run.first_error(range(int(os.environ.get("WORLD_SIZE", 1)))):
            raise RuntimeError("ended, since another rank failed") from None  # srun's SIGTERM, or the launcher's
        if not isinstance(error, Preempted):  # it went wrong by the signal: a peer left, a worker process died
            log.warning("since the signal: %r", error)
    starts = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
    if config.kind in STARTING_OVER and SIGUSR2 in stop.received and starts >= MOST_STARTS:
        raise UsageError(
            f"not done in {starts} starts, each from the beginning; give it more resources.time, or less to do"
        )
    _leave_word(run, rank, "preempted", f"stopped; {AGAIN}")
    then = None
    if rank == 0:  # a SIGTERM may also mean that another rank died: nothing is requeued for it
        then = requeue(stop.received) if SIGUSR2 in stop.received else already_requeued()
    raise Preempted(f"stopped; {then or AGAIN}")


def _begin(config: JobConfig, run: Run) -> None:
    run.update_status(
        kind=config.kind,
        state="running",
        started=now(),
        finished=None,
        error=None,
        note=None,
        continued_from=None,
        host=socket.gethostname(),
        pid=os.getpid(),
        slurm_job_id=job_id(os.environ),
    )
    run.write_environment()


def _failed(run: Run, rank: int, error: Exception) -> int:
    full = _full_disk(run, error)
    mendable = full is not None or isinstance(error, UserError)
    text = (full or str(error)) if mendable else f"{type(error).__name__}: {error}"
    log.error("%s", full or error, exc_info=None if mendable and not os.environ.get("STPREDICT_DEBUG") else error)
    code = error.exit_status if isinstance(error, UserError) else 1
    _leave_word(run, rank, "failed", text.splitlines()[0] if text else repr(error), code)
    return code


def _leave_word(run: Run, rank: int, state: State, line: str, code: int = EXIT_PREEMPTED) -> None:
    """Says how this rank ended in its .error file if it failed and, on rank 0, in status.json. Where even that cannot
    be written, the log alone says it."""
    try:
        if state == "failed":
            run.write_error(rank, line, code)
        if rank == 0:
            first = run.first_error(range(int(os.environ.get("WORLD_SIZE", 1)))) if state == "failed" else None
            run.update_status(state=state, finished=now(), error=first[1] if first else line)
    except Exception as error:
        log.error("%s: cannot say there that the job is %s: %s", run.path, state, error)


def _full_disk(run: Run, error: BaseException) -> str | None:
    """What to say if ``error``, or what led to it, is a full disk. (A failed write does not know its file's name.)"""
    seen: list[BaseException] = []
    chain = [error]
    while chain:
        link = chain.pop(0)
        if link in seen:
            continue
        seen.append(link)
        if isinstance(link, OSError) and link.errno in FULL:
            where = link.filename or run.path
            return f"{where}: {FULL[link.errno]}; make room and run again: it continues where it stopped"
        chain += [other for other in (link.__cause__, link.__context__) if other is not None]
    return None
