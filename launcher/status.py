"""What ``stpredict status`` shows: one row per job, from status.json files alone."""

import socket
from datetime import UTC, datetime
from pathlib import Path

import psutil
import yaml
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import UsageError
from launcher.parts import part_runs
from launcher.progress import format_seconds, format_values
from stpredict.run import Run, Status

WIDE = 110  # characters, from which on there is room for a column of values
COLOURS = {"done": "green", "running": "cyan", "preempted": "yellow", "failed": "red", "lost": "red"}


class Row(BaseModel):
    """One job. ``state`` is that of its run, or ``lost``: said to be running, but its process is gone."""

    job: str
    state: str
    status: Status | None = None
    elapsed_s: float | None = None
    heartbeat_age_s: float | None = None
    eta_s: float | None = None


def runs_of(path: Path) -> dict[str, Run]:
    """Job → run: those of a pipeline's run directory in its order, those of the parts of a run that is not merged
    yet, or the one run that ``path`` is."""
    if (path / "pipeline.yaml").is_file():
        jobs = yaml.safe_load((path / "pipeline.yaml").read_text())["jobs"]
        return {name: Run(path / name) for name in jobs}
    if not Run(path).status_path.is_file() and (parts := part_runs(path)):
        return {part.path.name: part for part in parts}
    if not Run(path).status_path.is_file():
        raise UsageError(f"{path} is not a run directory: it has neither status.json nor pipeline.yaml")
    return {path.resolve().name: Run(path)}


def rows(path: Path) -> list[Row]:
    return [_row(name, run.status()) for name, run in runs_of(path).items()]


def show(rows: list[Row], console: Console) -> None:
    """A table, and below it what went wrong. On a narrow terminal the values, too, stand below it."""
    live = any(row.state in ("running", "lost") for row in rows)
    wide = console.width >= WIDE
    columns = [
        "job",
        "state",
        "progress",
        *(["values"] * wide),
        "elapsed",
        *(["left", "heartbeat" if wide else "seen"] * live),
    ]
    table = Table(*columns, box=box.SIMPLE, pad_edge=False, show_edge=False)
    for column in table.columns:
        column.no_wrap = column.header != ("values" if wide else "job")
        column.overflow = "fold"
    for row in rows:
        cells = [row.job, f"[{COLOURS.get(row.state, 'default')}]{row.state}[/]"]
        if row.status:
            values = [format_values(row.status)] if wide else []
            cells += [_progress(row.status, wide), *values, format_seconds(row.elapsed_s)]
        if row.state in ("running", "lost"):
            cells += [format_seconds(row.eta_s), format_seconds(row.heartbeat_age_s)]
        table.add_row(*cells)
    console.print(table)
    for row in rows:
        values = format_values(row.status) if row.status and not wide else None
        for line in (values, row.status.error, row.status.note) if row.status else ():
            if line:
                console.print(f"{row.job}: {line}", markup=False, highlight=False, soft_wrap=True)


def _progress(status: Status, wide: bool) -> str:
    if not status.step:
        return status.phase
    of = f"/{status.steps}" if status.steps else ""
    return f"{status.step}{of}" + (f" {status.unit}s" if wide or status.unit != "step" else "")


def is_lost(status: Status) -> bool:
    """Unfinished by a process of this host that no longer is."""
    here = status.host == socket.gethostname() and status.pid is not None
    return status.state in ("pending", "running") and here and not _is_alive(status.pid)


def _is_alive(pid: int) -> bool:
    """False for a zombie too: dead, but its parent has not asked for it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _row(name: str, status: Status | None) -> Row:
    if status is None:
        return Row(job=name, state="not started")
    state = "lost" if is_lost(status) else status.state
    age = _seconds_since(status.heartbeat)
    ended = age if state == "lost" else _seconds_since(status.finished) if status.finished else 0.0
    started = _seconds_since(status.started)
    return Row(
        job=name,
        state=state,
        status=status,
        elapsed_s=None if started is None else started - ended,
        heartbeat_age_s=age,
        eta_s=max(0.0, status.eta_s - age) if state == "running" and status.eta_s is not None else None,
    )


def _seconds_since(at: str | None) -> float | None:
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() if at else None
