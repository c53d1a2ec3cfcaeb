"""A run directory: what one job wrote, and where. Torch-free, so that a login node can read it.

config.yaml  status.json  metrics.jsonl  scale.json  environment.json  tensorboard/  logs/rank_N.log  logs/rank_N.error
checkpoints/step_00001000/  export/  samples/
"""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.disk import renamed
from data_pipeline.errors import UsageError, UserError
from stpredict.source import output, source_state

_SOURCE = Path(__file__).parents[1]
State = Literal["pending", "running", "done", "failed", "preempted"]


class Status(BaseModel):
    """Contents of status.json. ``step`` of ``steps`` counts ``unit``s of the job's own work."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    state: State = "pending"
    step: int = 0
    steps: int | None = None
    unit: str = "step"
    phase: str = ""
    values: dict[str, float] = {}
    eta_s: float | None = None
    heartbeat: str | None = None
    started: str | None = None
    finished: str | None = None
    host: str | None = None
    pid: int | None = None
    slurm_job_id: str | None = None  # of an array's task ARRAY_TASK
    fingerprint: str | None = None
    error: str | None = None
    continued_from: int | None = None  # the step of the checkpoint that this start began with
    note: str | None = None  # what else there is to say of how it ended


class RankError(BaseModel):
    """Contents of an .error file: why a rank failed, with which exit status, the node to blame, and, under SLURM, in
    which start of the job."""

    error: str
    exit_status: int = 1
    node: str
    start: str | None = None


class Run:
    """Paths and small files of one run directory. Nothing is created before something is written."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    config_path = property(lambda self: self.path / "config.yaml")
    status_path = property(lambda self: self.path / "status.json")
    metrics_path = property(lambda self: self.path / "metrics.jsonl")
    environment_path = property(lambda self: self.path / "environment.json")
    scale_path = property(lambda self: self.path / "scale.json")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    export = property(lambda self: self.path / "export")
    samples = property(lambda self: self.path / "samples")
    logs = property(lambda self: self.path / "logs")

    def log_path(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def error_path(self, rank: int) -> Path:
        """Why this rank failed, a RankError. There only if it did."""
        return self.logs / f"rank_{rank}.error"

    def write_error(self, rank: int, error: str, exit_status: int = 1, node: str | None = None) -> None:
        """``node`` is the one to blame (default: this one)."""
        start = slurm_start(os.environ)
        said = RankError(error=error, exit_status=exit_status, node=node or node_name(), start=start)
        write_atomically(self.error_path(rank), said.model_dump_json(indent=1) + "\n")

    def errors(self, ranks: Iterable[int]) -> list[tuple[int, RankError]]:
        """Those of ``ranks`` that failed, the first one first: it knows the cause, the others only lost their peer."""
        files = [(path.stat().st_mtime_ns, rank) for rank in ranks if (path := self.error_path(rank)).is_file()]
        return [(rank, RankError.model_validate_json(self.error_path(rank).read_text())) for _, rank in sorted(files)]

    def first_error(self, ranks: Iterable[int]) -> tuple[int, str] | None:
        """Which of ``ranks`` failed first, and why."""
        errors = self.errors(ranks)
        return (errors[0][0], errors[0][1].error) if errors else None

    def status(self) -> Status | None:
        """What status.json says, or None where there is none. UsageError where it is damaged."""
        try:
            return Status.model_validate_json(self.status_path.read_text())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise UsageError(f"{self.status_path}: damaged ({error.errors()[0]['msg']}); remove it") from None

    def update_status(self, **changes: Any) -> Status:
        """Merges ``changes`` into status.json and stamps the heartbeat. One writer at a time: rank 0, or the
        launcher before the ranks start and after they end."""
        status = self.status()
        if status is None and "kind" not in changes:
            raise UserError(f"{self.status_path} is gone: was the run directory removed while the job ran?")
        fields = status.model_dump() if status else {}
        status = Status.model_validate({**fields, **changes, "heartbeat": now()})
        write_atomically(self.status_path, status.model_dump_json(indent=1) + "\n")
        return status

    def write_config(self, text: str) -> None:
        write_atomically(self.config_path, text)

    def write_environment(self) -> None:
        """Versions, git commit and diff, and hardware: what a person needs to know to repeat the run."""
        environment = {
            "written": now(),
            "command": sys.argv,
            "python": sys.version,
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "directory": str(Path.cwd()),
            "cpus": os.cpu_count(),
            "cpu": _cpu(),
            "gpus": (output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
            "packages": {d.name: d.version for d in sorted(distributions(), key=lambda d: d.name.lower())},
            **source_state(_SOURCE),
        }
        write_atomically(self.environment_path, json.dumps(environment, indent=1) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in the order written; half a line, left by a kill, is left out."""
        try:
            lines = self.metrics_path.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class Progress:
    """Reports a job's progress to status.json, at most twice a second: what bars and `status` show."""

    def __init__(self, run: Run, steps: int | None, unit: str, interval_s: float = 0.5):
        self.run, self.steps, self.unit, self.interval_s = run, steps, unit, interval_s
        self._last, self._values = 0.0, {}
        self._first: tuple[float, int] | None = None

    def update(self, step: int, phase: str = "", **values: float) -> None:
        at = time.monotonic()
        self._first = self._first or (at, step)
        self._values = values or self._values  # known at some steps only: the last ones stay
        if at - self._last < self.interval_s and step != self.steps:
            return
        self._last = at
        fields = {"step": step, "steps": self.steps, "unit": self.unit, "phase": phase}
        self.run.update_status(**fields, values=self._values, eta_s=self._eta(at, step))

    def _eta(self, at: float, step: int) -> float | None:
        """Seconds left at the mean rate since this process began, which after a resume is not step 0."""
        first_at, first_step = self._first
        if self.steps is None or step <= first_step:
            return None
        return round((self.steps - step) * (at - first_at) / (step - first_step), 1)


def node_name() -> str:
    """This machine, as SLURM calls it if it is a node of its."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_start(environment: Mapping[str, str]) -> str | None:
    """Names this start of this SLURM job (a requeued one has the same id); None outside of SLURM."""
    job = environment.get("SLURM_JOB_ID")
    return job and f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of one."""
    try:
        with renamed(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that failed does not know its file
        raise


def _cpu() -> str | None:
    """The processor's name as Linux gives it; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
