"""A job's progress, read from status.json: a bar on a terminal, elsewhere a line now and then. And a bar for commands
that read many bytes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stpredict.run import Run, Status

EVERY_S = 10.0
EVERY_SHARE = 0.1


@contextmanager
def bytes_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; what it yields is told the bytes that are done, and all."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def bars_of_jobs(console: Console) -> Iterator[Progress | None]:
    """On a terminal, where the jobs that run at once show a bar each."""
    if not console.is_terminal:
        yield None
        return
    with _bar(console) as bars:
        yield bars


class Watch:
    """Shows what a run's status says, each time it is asked to: in a line of ``bars``, which is gone when the job has
    ended, or alone. Use as a context manager."""

    def __init__(self, run: Run, name: str, console: Console, bars: Progress | None = None):
        self.run, self.name, self.console = run, name, console
        self.alone = bars is None
        self.bar = bars or (_bar(console) if console.is_terminal else None)
        self.task = self.bar.add_task(name, total=None, unit="", values="") if self.bar else None
        self.shown_at, self.shown_step = time.monotonic(), 0
        self.said_where_from = False

    def __enter__(self) -> Self:
        if self.bar and self.alone:
            self.bar.start()
        elif not self.bar:
            self._line("started", f"log: {self.run.log_path(0)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        if self.bar and self.alone:
            self.bar.stop()
        elif self.bar:
            self.bar.remove_task(self.task)

    def show(self) -> None:
        status = self.run.status()
        if status is None or status.state == "pending":
            return
        if status.continued_from is not None and not self.said_where_from:
            self.said_where_from = True
            self._line(f"continues from the checkpoint of {status.unit} {status.continued_from}")
        if self.bar:
            unit = f"{status.unit}s {status.phase}".strip()
            self.bar.update(
                self.task, completed=status.step, total=status.steps, unit=unit, values=format_values(status)
            )
        elif self._worth_a_line(status):
            self.shown_at, self.shown_step = time.monotonic(), status.step
            left = f"{format_seconds(status.eta_s)} left" if status.eta_s else ""
            self._line(format_step(status), status.phase, format_values(status), left)

    def _worth_a_line(self, status: Status) -> bool:
        if status.step == self.shown_step:
            return False
        self.shown_step = min(self.shown_step, status.step)  # a new phase counts from 0 again
        by_share = bool(status.steps) and status.step - self.shown_step >= EVERY_SHARE * status.steps
        return by_share or time.monotonic() - self.shown_at >= EVERY_S or status.step == status.steps

    def _line(self, *parts: str) -> None:
        self.console.print(
            f"{self.name}: " + "  ".join(filter(None, parts)), soft_wrap=True, highlight=False, markup=False
        )


def format_step(status: Status) -> str:
    if not status.steps:
        return f"{status.step} {status.unit}s"
    return f"{status.unit} {status.step}/{status.steps} ({status.step / status.steps:.0%})"


def format_values(status: Status, most: int = 3) -> str:
    """``most`` of a status' values, with four digits or more: ``loss 0.25 41.2 samples/s MFU 38%``."""
    return " ".join(_format(name, value) for name, value in islice(status.values.items(), most))


def _format(name: str, value: float) -> str:
    if name == "mfu":
        return f"MFU {value:.0%}"
    number = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{number} {name.removesuffix('_per_s')}/s" if name.endswith("_per_s") else f"{name} {number}"


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
        console=console,
        redirect_stdout=sys.stdout.isatty(),  # what goes into a file stays out of the terminal
    )
