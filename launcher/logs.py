"""What ``stpredict logs`` prints: the end of a rank's log, and what comes after it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.errors import UsageError
from launcher.status import runs_of
from stpredict.run import Run


def find_log(path: Path, job: str | None, rank: int) -> Path:
    """The log of ``rank``: of the run ``path``, or of a ``job`` (default: the last started) of a pipeline's run."""
    runs = runs_of(path)
    if job is not None and job not in runs:
        raise UsageError(f"{path} has no job {job!r}; jobs: {', '.join(runs)}")
    log = (runs[job] if job else _latest(runs)).log_path(rank)
    if not log.is_file():
        known = ", ".join(sorted(file.name for file in log.parent.glob("rank_*.log"))) or "none"
        raise UsageError(f"{log} does not exist; logs there: {known}")
    return log


def tail(log: Path, lines: int) -> list[str]:
    with log.open(errors="replace") as file:
        return list(deque(file, maxlen=lines))


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


def _latest(runs: dict[str, Run]) -> Run:
    started = [(status.started or "", run) for run in runs.values() if (status := run.status())]
    return max(started, key=lambda pair: pair[0])[1] if started else next(iter(runs.values()))
