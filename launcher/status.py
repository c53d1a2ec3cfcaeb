"""What ``stpredict status`` shows: a table of a run's jobs, once or until all have ended."""

import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.overview import Row, Slurm, rows
from launcher.progress import format_seconds, format_values
from stpredict.run import Status

WIDE = 110  # characters, from which on there is room for a column of values
VERY_WIDE = 150  # and for what SLURM calls the job, and where it is
ASK_EVERY_S = 5.0  # squeue loads the controller that all users share
LOOK_EVERY_S = 1.0
COLOURS = {
    **dict.fromkeys(("done", "up to date"), "green"),
    **dict.fromkeys(("running", "starting", "merging", "ending"), "cyan"),
    **dict.fromkeys(("preempted", "requeued", "cancelled"), "yellow"),
    **dict.fromkeys(("failed", "lost"), "red"),
}
MOST_PARTS = 8  # of an array that get rows of their own
MOST_ROWS = 30  # jobs, from which on the trials of a study of which there is nothing to tell share a row
QUIET = ("done", "up to date", "not started", "queued", "submitted", "cancelled")
ENDED_BADLY = ("failed", "lost", "preempted", "requeued", "cancelled")


def show(rows: list[Row], console: Console) -> None:
    """A table, and below it what went wrong. On a narrow terminal the values, too, stand below it."""
    rows = folded(rows)
    console.print(as_table(rows, console.width), soft_wrap=False)
    for line in below(rows, console.width):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def watch(path: Path, console: Console, slurm: Slurm, ask_every_s: float = ASK_EVERY_S) -> list[Row]:
    """Shows the table until all jobs have ended; returns the last rows. squeue is asked every ``ask_every_s``, run
    directories are read in between."""
    asked_at = time.monotonic()
    found = rows(path, slurm)
    note = slurm.note

    def view() -> RenderableType:
        shown = folded(found)
        lines = [*below(shown, console.width), *([f"note: {note}"] if note else [])]
        return Group(as_table(shown, console.width), *map(Text, lines))

    with Live(view(), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while any(row.live for row in found):
            time.sleep(LOOK_EVERY_S)
            ask = time.monotonic() - asked_at >= ask_every_s
            if ask:
                asked_at = time.monotonic()
            found = rows(path, slurm, ask)
            note = slurm.note
            live.update(view(), refresh=True)
    return found


def as_table(rows: list[Row], width: int) -> Table:
    live = any(row.state in ("running", "lost") for row in rows)
    wide, slurm = width >= WIDE, width >= VERY_WIDE and any(row.slurm_ids for row in rows)
    columns: dict[str, Callable[[Row], str]] = {
        "job": lambda row: row.job,
        "state": lambda row: _coloured(row.state) + (f" ({row.reason})" if wide and row.live and row.reason else ""),
        "progress": lambda row: _progress(row, wide),
    }
    if wide:
        columns["values"] = lambda row: format_values(row.status) if row.status else ""
    columns["elapsed"] = lambda row: format_seconds(row.elapsed_s)
    if live:
        columns["left"] = lambda row: format_seconds(row.eta_s)
        columns["heartbeat" if wide else "seen"] = lambda row: (
            format_seconds(row.heartbeat_age_s) if row.state in ("running", "lost") else ""
        )
    if slurm:
        columns["node"] = lambda row: row.nodes or ""
        columns["SLURM"] = short_ids
    table = Table(*columns, box=box.SIMPLE, pad_edge=False, show_edge=False)
    for column in table.columns:
        column.no_wrap = column.header not in (("values", "state") if wide else ("job",))
        column.overflow = "fold"
    for row in with_parts(rows):
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def folded(rows: list[Row]) -> list[Row]:
    """The rows; of many, those of trials together that are the same job in the same state, where that is all."""
    if len(rows) <= MOST_ROWS:
        return rows
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        role = row.job.removeprefix(f"{row.trial}-")
        alike = row.trial is not None and row.state in QUIET
        groups.setdefault((role, row.state, row.reason) if alike else (row.job,), []).append(row)
    return [
        Row(job=f"{key[0]} of {len(group)} trials", state=key[1], reason=key[2], live=group[0].live)
        if len(group) > 1
        else group[0]
        for key, group in groups.items()
    ]


def with_parts(rows: list[Row]) -> list[Row]:
    """The rows, each with those of its parts that did not end well below it, or the first of them."""
    return [shown for row in rows for shown in (row, *row.bad_parts[:MOST_PARTS])]


def below(rows: list[Row], width: int) -> list[str]:
    """Lines under the table: what has no column at this width, and how jobs ended."""
    lines = []
    for row in rows:
        said = set()  # what ended all parts of an array stands there once
        for shown in with_parts([row]):
            for line in _lines_of(shown, width):
                if line not in said:
                    said.add(line)
                    lines.append(f"{shown.job}: {line}")
        if (more := len(row.bad_parts) - MOST_PARTS) > 0:
            lines.append(f"{row.job}: {more} more parts did not end well; --json has them all")
    return lines


def _lines_of(row: Row, width: int) -> list[str]:
    status = row.status
    details = [row.reason] if width < WIDE or not row.live else []
    if width < WIDE and status:
        details.append(format_values(status))
    if width < VERY_WIDE and row.live and row.slurm_ids:
        details.append(f"SLURM {short_ids(row)}{f' on {row.nodes}' if row.nodes else ''}")
    error = status.error if status and row.state in (*ENDED_BADLY, "pending", "running", "ending") else None
    lines = ["  ".join(filter(None, details)), error, status.note if status else None]
    return [line for line in lines if line]


def short_ids(row: Row) -> str:
    """SLURM's numbers for a job: an array's tasks have one together."""
    return ",".join(dict.fromkeys(id.partition("_")[0] for id in row.slurm_ids))


def _coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'default')}]{state}[/]"


def _progress(row: Row, wide: bool) -> str:
    parts = f"{row.parts_done}/{row.parts} parts" if row.parts and row.parts_done != row.parts else ""
    return "  ".join(filter(None, (parts, _step(row.status, wide) if row.status else "")))


def _step(status: Status, wide: bool) -> str:
    if not status.step:
        return status.phase
    of = f"/{status.steps}" if status.steps else ""
    return f"{status.step}{of}" + (f" {status.unit}s" if wide or status.unit != "step" else "")
