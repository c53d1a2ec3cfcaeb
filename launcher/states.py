"""What state a job is in, decided from what its run directory, squeue and the accounts say. Asks nobody anything."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from launcher.slurm.queue import Queued
from stpredict.run import Status

ENDED = {
    "BOOT_FAIL": "its node failed",
    "CANCELLED": "by scancel",
    "DEADLINE": "ran into its deadline",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "ran out of memory",
    "PREEMPTED": "preempted by SLURM",
    "TIMEOUT": "ran into its time limit",
}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}  # in all else it has its nodes
UNMET = {"failed", "cancelled", "lost", "preempted"}  # states in which a job lets down those that need it


class Verdict(NamedTuple):
    """A job's state, and why or what for. ``live``: without anybody's doing there is more to come."""

    state: str
    reason: str | None = None
    live: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of a job. ``status`` may be that of an earlier launch; ``slurm_id`` is who does it in this one."""

    status: Status | None = None
    gone: bool = False  # the process that wrote the status was on this host and has ended
    slurm_id: str | None = None
    answered: bool = True  # SLURM could be asked
    queued: Queued | None = None  # what squeue says of ``slurm_id``
    ended: str | None = None  # what the accounts say of it
    launched: str | None = None
    cancelled: bool = False  # by `stpredict cancel`
    unmet: str | None = None  # "needs X, which failed"
    last_words: Callable[[], str | None] = lambda: None  # last line of SLURM's log of ``slurm_id``

    @property
    def own(self) -> Status | None:
        """The status, if this launch's start of the job wrote it, or somebody who ran the job by hand since."""
        if self.slurm_id is None or self.status is None or self.status.slurm_job_id == self.slurm_id:
            return self.status
        by_hand = self.status.slurm_job_id is None and (self.status.started or "") > (self.launched or "")
        return self.status if by_hand else None


def decide(facts: Facts) -> Verdict:
    status = facts.status
    if status and status.state == "done":
        before = facts.launched is not None and status.finished is not None and status.finished < facts.launched
        return Verdict("up to date" if before else "done")
    if facts.slurm_id is None:
        return _of_a_process(facts)
    if facts.queued and not facts.queued.over:
        return _in_the_queue(facts, facts.queued)
    if not facts.answered:
        live = facts.own is None or facts.own.state in ("pending", "running")
        return Verdict(facts.own.state if facts.own else "submitted", live=live)
    return _gone_from_the_queue(facts, facts.queued.state if facts.queued else facts.ended)


def _of_a_process(facts: Facts) -> Verdict:
    """A job of the local executor, or one that somebody started by hand."""
    if facts.status is None:
        return Verdict("cancelled", "before it started") if facts.cancelled else Verdict("not started", facts.unmet)
    if facts.status.state in ("pending", "running"):
        if not facts.gone:
            return Verdict(facts.status.state, live=True)
        return Verdict("cancelled", "ended before it could save") if facts.cancelled else Verdict("lost")
    if facts.status.state == "preempted" and facts.cancelled:
        return Verdict("cancelled")
    return Verdict(facts.status.state)


def _in_the_queue(facts: Facts, queued: Queued) -> Verdict:
    if queued.state in WAITING:
        reason = queued.reason if queued.state == "PENDING" else queued.state
        return Verdict("requeued" if facts.own else "queued", None if reason == "None" else reason, live=True)
    state = facts.own.state if facts.own else "pending"
    if state == "pending":
        state = "starting"
    elif state == "running" and queued.state == "COMPLETING":
        state = "ending"
    plain = queued.state in ("RUNNING", "COMPLETING")
    return Verdict(state, None if plain else queued.state, live=True)


def _gone_from_the_queue(facts: Facts, ended: str | None) -> Verdict:
    by_hand = ended == "CANCELLED"
    cancelled = facts.cancelled or by_hand
    why = ENDED.get(ended or "")
    if facts.own and facts.own.state in ("failed", "preempted"):
        if facts.own.state == "preempted" and cancelled:
            return Verdict("cancelled", why if by_hand and not facts.cancelled else None)
        return Verdict(facts.own.state, None if by_hand else why)
    if facts.own:
        if cancelled:
            return Verdict("cancelled", "ended before it could save")
        return Verdict("lost", why or "SLURM has it no more")
    if facts.cancelled:
        return Verdict("cancelled", "before it started")
    said = facts.last_words()
    if facts.unmet and said is None:
        return Verdict("cancelled", facts.unmet)
    if by_hand:
        return Verdict("cancelled", "by scancel, before it started")
    if said is not None:
        return Verdict("failed", f"{why}: {said}" if why else said)
    return Verdict("failed", why) if why else Verdict("lost", "SLURM has it no more, and it never started")


def unmet(states: dict[str, Verdict]) -> str | None:
    """Which of the needed jobs, given with their states, lets down the one that needs them, and why: "needs tokenizer,
    which failed"."""
    for name, verdict in states.items():
        if verdict.reason and verdict.reason.startswith("needs "):
            return f"needs {name}, which {verdict.reason}"
        if not verdict.live and verdict.state in UNMET:
            said = {"cancelled": "was cancelled", "lost": "is lost", "preempted": "stopped early"}
            return f"needs {name}, which {said.get(verdict.state, verdict.state)}"
    return None


def combine(parts: list[Verdict], merge: Verdict | None, launcher: bool) -> Verdict:
    """The state of an array: that of its parts until all are done, and then that of its ``merge``, which is None where
    SLURM is not to do one: there a ``launcher`` here, if it is alive, does parts and merge in turn."""
    live = [part for part in parts if part.live]
    for state in ("running", "ending", "starting", "pending", "requeued", "queued", "submitted"):
        found = next((part for part in live if part.state == state), None)
        if found:
            return Verdict(state, found.reason, live=True)
    for state in ("failed", "lost", "cancelled", "preempted"):
        found = next((part for part in parts if part.state == state), None)
        if found:
            return Verdict(state, found.reason, live=bool(live))
    if not any(part.state in ("done", "up to date") for part in parts):
        return parts[0]
    if merge is None and launcher:
        return Verdict("merging" if all(part.state != "not started" for part in parts) else "running", live=True)
    if merge is None:
        return Verdict("preempted", "the launcher ended in between")
    match merge.state:
        case "done" | "up to date":
            return merge
        case "starting" | "running" | "ending" | "pending":
            return Verdict("merging", live=True)
    return Verdict(merge.state, f"merge: {merge.reason}" if merge.reason else "merge", live=merge.live)
