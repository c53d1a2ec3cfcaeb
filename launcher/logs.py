"""What ``stpredict logs`` prints: the end of a rank's log, and what comes after it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.errors import UsageError
from launcher.overview import is_lost, runs_of
from stpredict.run import Run


def find_run(path: Path, job: str | None) -> Run:
    """The run ``path``, or that of ``job`` (default: the last started) of the pipeline's run ``path``."""
    runs = runs_of(path)
    if job is not None and job not in runs:
        raise UsageError(f"{path} has no job {job!r}; jobs: {', '.join(runs)}")
    return runs[job] if job else _latest(runs)


def find_log(run: Run, rank: int) -> Path:
    log = run.log_path(rank)
    if not log.is_file():
        known = ", ".join(sorted(file.name for file in run.logs.glob("rank_*.log"))) or "none"
        raise UsageError(f"{log} does not exist; logs there: {known}")
    return log


def follow(log: Path, lines: int, going_on: Callable[[], bool], poll_s: float = 0.3) -> Iterator[str]:
    """The last ``lines`` of ``log`` and then what is appended to it, until ``going_on`` says no."""
    with log.open(errors="replace") as file:
        yield from deque(file, maxlen=lines)
        while True:
            last = not going_on()  # asked before reading, so that nothing written before the end is missed
            yield from file
            if last:
                return
            time.sleep(poll_s)


def is_going_on(run: Run) -> bool:
    status = run.status()
    return status is not None and status.state in ("pending", "running") and not is_lost(status)


def _latest(runs: dict[str, Run]) -> Run:
    started = [(status.started or "", run) for run in runs.values() if (status := run.status())]
    return max(started, key=lambda pair: pair[0])[1] if started else next(iter(runs.values()))
