"""What is to be said of each job of a run, put together from the run directories, the launch's record and SLURM."""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote

import psutil
import yaml
from pydantic import BaseModel, Field

from data_pipeline.errors import UsageError, UserError
from launcher import rundir, states
from launcher.config import SlurmCluster
from launcher.parts import part_runs
from launcher.record import JobRecord, PipelineRun, Record, Submitted, pipeline_of
from launcher.slurm import accounting, queue
from launcher.slurm.logs import last_words
from launcher.states import Facts, Verdict
from stpredict.jobs.config import PARTS
from stpredict.run import Run, Status, now

ANSWERS_S = 15.0  # a person waits; without an answer there are still the run directories


class Row(BaseModel):
    """One job. ``state`` may be ``lost``: said to be running, but its process is gone. Of an array, ``status`` is the
    sum of its parts, and ``bad_parts`` are those that did not end well; ``live``: there is more to come by itself."""

    job: str
    state: str
    reason: str | None = None
    live: bool = False
    trial: str | None = None
    slurm_ids: list[str] = []
    nodes: str | None = None
    status: Status | None = None
    elapsed_s: float | None = None
    heartbeat_age_s: float | None = None
    eta_s: float | None = None
    parts: int | None = None
    parts_done: int | None = None
    bad_parts: list["Row"] = []
    all_parts: list["Row"] = Field([], exclude=True)


class Slurm:
    """What SLURM says of jobs. ``note`` is why it says nothing, or not all, in one line."""

    def __init__(self) -> None:
        self.answered, self.note = True, None
        self.queue: dict[str, queue.Queued] = {}
        self.asked: str | None = None  # when
        self._ended: dict[str, str] = {}  # how a job ended stays known, also when squeue has forgotten it
        self._forgotten: set[str] = set()

    def ask(self, ids: Iterable[str], user: int | None = None) -> None:
        """Asks squeue about all ``ids`` at once."""
        ids, self.note, self.asked = set(ids), None, now()
        try:
            self.answered = queue.here() or not ids
            self.queue = queue.known(ids, user, ANSWERS_S) if self.answered else {}
            if not self.answered:
                self.note = "no squeue on this machine: these are the states that the jobs last wrote"
        except UserError as error:
            self.answered, self.queue = False, {}
            said = str(error).rpartition("squeue: ")[2]  # the last of its complaints
            self.note = f"squeue: {said}: these are the states that the jobs last wrote"
        self._ended |= {id: job.state for id, job in self.queue.items() if job.over}
        self._forgotten = ids - self.queue.keys() - self._ended.keys()

    def said(self, id: str, status: Status | None) -> queue.Queued | None:
        """What squeue said of a job, unless ``status`` knows better: it has started since."""
        found = self.queue.get(id)
        if found and found.state == "PENDING" and status and status.slurm_job_id == id and status.started:
            return found._replace(state="RUNNING") if status.started > self.asked else found
        return found

    def ended(self, id: str) -> str | None:
        """How a job ended. Those that squeue has forgotten are known where there are accounts, which are asked once,
        about all of them together."""
        if self.answered and id in self._forgotten:
            forgotten, self._forgotten = self._forgotten, set()
            try:
                self._ended |= accounting.ended(forgotten)
            except UserError as error:
                self.note = str(error)
        return self._ended.get(id)


def runs_of(path: Path) -> dict[str, Run]:
    """Job → run: those of a pipeline's run directory in its order, those of the parts of a run that is not merged
    yet, or the one run that ``path`` is."""
    if (path / "pipeline.yaml").is_file():
        jobs = yaml.safe_load((path / "pipeline.yaml").read_text())["jobs"]
        return {name: Run(path / name) for name in jobs}
    if not Run(path).status_path.is_file() and (parts := part_runs(path)):
        return {part.path.name: part for part in parts}
    if not Run(path).status_path.is_file():
        if found := pipeline_of(path):
            raise UsageError(f"{path} has not begun; of its pipeline: stpredict status {quote(str(found[0]))}")
        raise UsageError(f"{path} is not a run directory: it has neither status.json nor pipeline.yaml")
    return {path.resolve().name: Run(path)}


def rows(path: Path, slurm: Slurm | None = None, ask: bool = True) -> list[Row]:
    """One row for each job of the run ``path``; of ``slurm``, where ``ask`` is false, what it said last is taken."""
    slurm = slurm or Slurm()
    record = PipelineRun(path).record() if (path / "pipeline.yaml").is_file() else None
    if record is None:
        return _rows_without_record(runs_of(path), slurm, ask)
    if ask:
        ids = record.slurm_ids() if isinstance(record.cluster, SlurmCluster) else ()
        slurm.ask(ids, PipelineRun(path).record_path.stat().st_uid)
    return list(_Pipeline(PipelineRun(path), record, slurm).rows())


def _rows_without_record(runs: dict[str, Run], slurm: Slurm, ask: bool) -> list[Row]:
    if ask:
        slurm.ask([status.slurm_job_id for run in runs.values() if (status := run.status()) and _needs_slurm(status)])
    return [_row(name, facts, states.decide(facts)) for name, facts in _facts_without_record(runs, slurm)]


def _facts_without_record(runs: dict[str, Run], slurm: Slurm) -> Iterator[tuple[str, Facts]]:
    statuses = {name: run.status() for name, run in runs.items()}
    mine = {name: status.slurm_job_id for name, status in statuses.items() if status and _needs_slurm(status)}
    for name, status in statuses.items():
        id = mine.get(name)
        seen = {"queued": slurm.said(id, status), "ended": slurm.ended(id) if id else None, "answered": slurm.answered}
        yield name, Facts(status=status, gone=status is not None and is_lost(status), slurm_id=id, **seen)


def _needs_slurm(status: Status) -> bool:
    return status.slurm_job_id is not None and status.state in ("pending", "running", "preempted", "failed")


class _Pipeline:
    def __init__(self, run: PipelineRun, record: Record, slurm: Slurm):
        self.run, self.record, self.slurm = run, record, slurm
        self.under_slurm = isinstance(record.cluster, SlurmCluster)  # what an earlier launch submitted may stand there

    def rows(self) -> Iterator[Row]:
        verdicts: dict[str, Verdict] = {}
        for name, job in self.record.jobs.items():
            if not self.under_slurm:
                job = job.model_copy(update={"submitted": []})
            unmet = states.unmet({need: verdicts[need] for need in job.needs})
            row = self._array_row(name, job, unmet) if job.array else self._job_row(name, job, unmet)
            verdicts[name] = Verdict(row.state, row.reason, row.live)
            row.trial = job.trial
            yield row

    def _job_row(self, name: str, job: JobRecord, unmet: str | None) -> Row:
        submitted = job.submitted[-1] if job.submitted else None
        facts = self._facts(name, Run(self.run.path / name).status(), submitted, unmet)
        row = _row(name, facts, states.decide(facts))
        row.slurm_ids = [submitted.slurm_id] if submitted else []
        return row

    def _array_row(self, name: str, job: JobRecord, unmet: str | None) -> Row:
        """Until the merge, the run directory of the whole says nothing; its parts' do."""
        whole = Run(self.run.path / name).status()
        by_part = {submitted.part: submitted for submitted in job.submitted if not submitted.merge}
        merge = next((submitted for submitted in job.submitted if submitted.merge), None)
        parts = []
        for part in range(job.array):
            home = Run(self.run.path / name / PARTS / f"{part}-of-{job.array}")
            facts = self._facts(name, home.status(), by_part.get(part), unmet)
            parts.append(_row(f"{name}.{part}", facts, states.decide(facts)))
        done = sum(part.state in ("done", "up to date") for part in parts)
        ids = [submitted.slurm_id for submitted in job.submitted]
        if whole and whole.state == "done":
            facts = Facts(status=whole, launched=self.record.launched)
            row = _row(name, facts, states.decide(facts))
            more = {"slurm_ids": ids, "parts": job.array, "parts_done": job.array, "all_parts": parts}
            return row.model_copy(update=more)
        merging = states.decide(self._facts(name, whole, merge, None)) if merge else None
        verdict = states.combine(
            [Verdict(p.state, p.reason, p.live) for p in parts], merging, _has_launcher(self.run.path)
        )
        status = _sum(parts)
        if status and merging and merging.state == "failed":
            status = status.model_copy(update={"error": whole and whole.error, "note": whole and whole.note})
        row = _row(name, Facts(status=status), verdict)
        alike = ("cancelled", verdict.reason) if verdict.state == "cancelled" else None
        bad = [part for part in parts if part.state in states.UNMET and (part.state, part.reason) != alike]
        nodes = ",".join(dict.fromkeys(part.nodes for part in parts if part.nodes and part.state == "running")) or None
        more = {"parts": job.array, "parts_done": done, "bad_parts": bad, "slurm_ids": ids, "nodes": nodes}
        return row.model_copy(update={**more, "all_parts": parts})

    def _facts(self, name: str, status: Status | None, submitted: Submitted | None, unmet: str | None) -> Facts:
        facts = Facts(
            status=status,
            gone=status is not None and is_lost(status),
            launched=self.record.launched,
            cancelled=self.record.cancelled is not None,
            unmet=unmet,
        )
        if submitted is None or (status and status.state == "done"):
            return facts
        id, queued = submitted.slurm_id, self.slurm.said(submitted.slurm_id, status)
        if queued and queued.name != self.record.slurm_name(submitted.of(name)):
            queued = None  # another SLURM's, or one that began to count anew
        return replace(
            facts,
            slurm_id=id,
            answered=self.slurm.answered,
            queued=queued,
            ended=self.slurm.ended(id),
            last_words=lambda: last_words(self.run.slurm_folder(submitted.of(name)), id),
        )


def _row(name: str, facts: Facts, verdict: Verdict) -> Row:
    status, state = facts.status, verdict.state
    row = Row(job=name, state=state, reason=verdict.reason, live=verdict.live, status=status)
    if facts.slurm_id:
        row.slurm_ids = [facts.slurm_id]
    if facts.queued:
        row.nodes = facts.queued.nodes or None
    elif facts.own:
        row.nodes = facts.own.host
    if status is None:
        return row
    age = _seconds_since(status.heartbeat)
    ended = age if state == "lost" else _seconds_since(status.finished) if status.finished else 0.0
    started = _seconds_since(status.started)
    row.elapsed_s = None if started is None else started - ended
    row.heartbeat_age_s = age
    row.eta_s = max(0.0, status.eta_s - age) if state == "running" and status.eta_s is not None else None
    return row


def _sum(parts: list[Row]) -> Status | None:
    """One status for all parts that have begun."""
    begun = [part.status for part in parts if part.status]
    if not begun:
        return None
    running = [part.status for part in parts if part.state == "running"]
    rates = {name for status in running for name in status.values if name.endswith("_per_s")}
    whole = len(begun) == len(parts) and all(status.steps for status in begun)
    left = [status.eta_s for status in running]
    return Status(
        kind=begun[0].kind,
        step=sum(status.step for status in begun),
        steps=sum(status.steps for status in begun) if whole else None,
        unit=begun[0].unit,
        values={name: sum(status.values.get(name, 0.0) for status in running) for name in sorted(rates)},
        eta_s=max(left) if left and whole and None not in left else None,
        heartbeat=max((status.heartbeat for status in begun if status.heartbeat), default=None),
        started=min((status.started for status in begun if status.started), default=None),
        finished=max(status.finished for status in begun) if all(status.finished for status in begun) else None,
    )


def _has_launcher(path: Path) -> bool:
    """Whether the last launcher of a run may still be at it. (Asking its lock could make another launcher fail.)"""
    try:
        owner = rundir.OWNER.match((path / ".lock").read_text())
    except FileNotFoundError:
        return False
    return owner is not None and (owner["host"] != socket.gethostname() or _is_alive(int(owner["pid"])))


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


def _seconds_since(at: str | None) -> float | None:
    """Not less than none: the clock of who wrote it may be ahead of this one."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()) if at else None
