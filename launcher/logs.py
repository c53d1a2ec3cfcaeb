"""What ``stpredict logs`` prints: the end of a rank's log, or of SLURM's, and what comes after it."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from data_pipeline.errors import UsageError
from launcher.overview import Row, Slurm, rows, runs_of
from launcher.parts import part_runs
from launcher.record import PipelineRun
from launcher.slurm.logs import log_files
from launcher.states import UNMET
from stpredict.jobs.config import PARTS
from stpredict.run import Run

ASK_EVERY_S = 5.0  # squeue loads the controller that all users share
LOOK_EVERY_S = 1.0


class LogReader:
    """The logs of ``rank`` of ``job`` (default: the last started), or of its ``part``, in the run ``path``; with
    ``slurm`` what SLURM wrote of it. Says on standard error what it is waiting for and how the job ended."""

    def __init__(self, path: Path, job: str | None, rank: int = 0, part: int | None = None, slurm: bool = False):
        self.path, self.rank, self.wants_slurm = path, rank, slurm
        self.slurm = Slurm()
        self.looked_at = self.asked_at = time.monotonic()
        found = rows(path, self.slurm)
        if job is not None and job not in [row.job for row in found]:
            raise UsageError(f"{path} has no job {job!r}; jobs: {', '.join(row.job for row in found)}")
        whole = next(row for row in found if row.job == job) if job else _latest(found)
        self.job, self.row = whole.job, whole
        self.is_merge = part is None and whole.reason is not None and whole.reason.startswith("merge")
        self.is_pipeline = (path / "pipeline.yaml").is_file()
        folder = path / self.job if self.is_pipeline else runs_of(path)[self.job].path
        self.part = None if self.is_merge else _choose_part(whole, folder, part)
        if self.part is None:
            self.run, self.name = Run(folder), self.job
        else:
            parts = {run.path.name.partition("-of-")[0]: run for run in part_runs(folder)}
            self.run = parts.get(str(self.part)) or Run(folder / PARTS / f"{self.part}-of-{whole.parts}")
            self.name = f"{self.job}.{self.part}"
            self.row = self._part_of(whole)

    def read(self, lines: int, follow: bool) -> Iterator[str]:
        """The last ``lines``, and with ``follow`` what is added until the job ends and SLURM has it no more."""
        if self.slurm.note:
            _say(f"note: {self.slurm.note}")
        if follow:
            self._wait_for_a_log()
        logs = self.files()
        if not logs:
            if self.row.live or self.row.state == "not started":
                _say(f"{self.name}: {_in_words(self.row)}: no log yet{'' if follow else '; -f waits for it'}")
                return
            raise UsageError(self._no_log())
        yield from tail(logs, lines, self.going_on if follow else lambda: False)
        if follow:
            self._look(at_once=True)
            _say(f"{self.name}: {_in_words(self.row)}")

    def as_json(self, line: str) -> str:
        """The line as an object on a line of its own; of an array's task, ``job`` is JOB.PART."""
        return json.dumps({"job": self.name, "rank": self.rank, "line": line.rstrip("\n")}) + "\n"

    def files(self) -> list[Path]:
        """The log that was asked for, or, where the job ended without it, SLURM's."""
        if self.wants_slurm:
            return self._slurms()
        log = self.run.log_path(self.rank)
        there = log.is_file() and not self.is_merge
        without = not there or (self.row.state in UNMET and self._is_older(log))
        if without and not self.row.live and (slurms := self._slurms()):
            _say(f"{self.name}: {_in_words(self.row)}, without a log of its own; SLURM's:")
            return slurms
        return [log] if there else []

    def going_on(self) -> bool:
        self._look()
        return self.row.live

    def _wait_for_a_log(self) -> None:
        said = None
        while not self.files() and self.row.live:
            if said != (said := _in_words(self.row)):
                _say(f"{self.name}: {said}: no log yet")
            time.sleep(LOOK_EVERY_S)
            self._look()

    def _look(self, at_once: bool = False) -> None:
        """Brings ``row`` up to date."""
        at = time.monotonic()
        if at - self.looked_at < LOOK_EVERY_S and not at_once:
            return
        self.looked_at = at
        ask = at_once or at - self.asked_at >= ASK_EVERY_S
        if ask:
            self.asked_at = at
        whole = next(row for row in rows(self.path, self.slurm, ask) if row.job == self.job)
        self.row = whole if self.part is None else self._part_of(whole)

    def _part_of(self, whole: Row) -> Row:
        return whole.all_parts[self.part] if whole.all_parts else whole

    def _slurms(self) -> list[Path]:
        """SLURM's logs of who does the job now, or did it last."""
        record = PipelineRun(self.path).record() if self.is_pipeline else None
        submitted = record.jobs[self.job].submitted if record else []
        mine = [one for one in submitted if (one.merge if self.is_merge else one.part == self.part and not one.merge)]
        if not mine:
            return []
        folder = PipelineRun(self.path).slurm_folder(mine[-1].of(self.job))
        return log_files(folder, mine[-1].slurm_id, self.rank)

    def _is_older(self, log: Path) -> bool:
        """Whether an earlier launch left it."""
        record = PipelineRun(self.path).record() if self.is_pipeline else None
        return record is not None and log.stat().st_mtime < datetime.fromisoformat(record.launched).timestamp()

    def _no_log(self) -> str:
        if not self.wants_slurm and not any(self.run.logs.glob("rank_*.log")):
            return f"{self.name} has no log: {_in_words(self.row)}"
        if self.wants_slurm:
            return f"{self.name}: SLURM wrote nothing of it ({_in_words(self.row)})"
        known = ", ".join(sorted(file.name for file in self.run.logs.glob("rank_*.log")))
        return f"{self.run.log_path(self.rank)} does not exist ({_in_words(self.row)}); logs there: {known}"


def tail(logs: Sequence[Path], lines: int, going_on: Callable[[], bool], poll_s: float = 0.3) -> Iterator[str]:
    """The last ``lines`` of each of ``logs`` and then what is appended to them, until ``going_on`` says no. Of several
    files each stretch begins with the file's name."""
    with ExitStack() as stack:
        files = [stack.enter_context(log.open(errors="replace")) for log in logs]
        shown = None
        for file in files:
            shown = yield from _show(file, deque(file, maxlen=lines), files, shown)
        while True:
            last = not going_on()  # asked before reading, so that nothing written before the end is missed
            for file in files:
                shown = yield from _show(file, file, files, shown)
            if last:
                return
            time.sleep(poll_s)


def _show(file, lines, files, shown):
    for line in lines:
        if len(files) > 1 and shown is not file:
            yield f"==> {file.name} <==\n"
        shown = file
        yield line
    return shown


def _choose_part(row: Row, folder: Path, part: int | None) -> int | None:
    """The part that was asked for, or one that did not end well, or the last started; None where there are none."""
    parts = {int(run.path.name.partition("-of-")[0]): run for run in part_runs(folder)}
    numbers = sorted({*parts, *range(row.parts or 0)})
    if part is not None and part not in numbers:
        raise UsageError(
            f"{row.job} has no part {part}" + (f"; it has 0 to {numbers[-1]}" if numbers else ": no array")
        )
    if part is not None or not numbers:
        return part
    for number, one in enumerate(row.all_parts):
        if one.state in UNMET and not one.live:
            return number
    started = {number: run.status().started or "" for number, run in parts.items() if run.status()}
    return max(started, key=started.get) if started else numbers[0]


def _latest(found: Sequence[Row]) -> Row:
    started = [(row.status.started or "", row) for row in found if row.status]
    return max(started, key=lambda pair: pair[0])[1] if started else found[0]


def _in_words(row: Row) -> str:
    return f"{row.state} ({row.reason})" if row.reason else row.state


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
