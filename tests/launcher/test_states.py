"""States of jobs, decided from given words of squeue, of sacct and of status.json."""

import pytest

from data_pipeline.errors import UserError
from launcher.slurm import accounting, queue
from launcher.slurm.logs import last_words
from launcher.slurm.queue import Queued
from launcher.states import Facts, Verdict, combine, decide, unmet
from stpredict.run import Status

SQUEUE = """\
7_0|RUNNING|None|gpu003|nbp.shards
7_1|PENDING|Resources||nbp.shards
8|PENDING|Dependency||nbp.shards.merge
9|CANCELLED|DependencyNeverSatisfied||nbp.a|b
99|RUNNING|None|gpu004|somebody else's
"""
SACCT = """\
11|COMPLETED
12|NODE_FAIL
12|TIMEOUT
13_4|CANCELLED by 1000
14|PENDING
15|RUNNING
99|FAILED
"""


def status(state, slurm_id=None, **fields):
    return Status(kind="prior", state=state, slurm_job_id=slurm_id, **fields)


def test_of_squeues_lines_those_that_were_asked_for_are_read():
    found = queue.parse(SQUEUE, {"7_0", "7_1", "8", "9", "10"})
    assert found["7_1"] == Queued("PENDING", "Resources", "", "nbp.shards")
    assert found["9"].name == "nbp.a|b"
    assert {id: job.over for id, job in found.items()} == {"7_0": False, "7_1": False, "8": False, "9": True}


def test_of_saccts_lines_the_last_end_of_each_job_counts():
    ids = {"11", "12", "13_4", "14", "15", "16"}
    assert accounting.parse(SACCT, ids) == {"11": "COMPLETED", "12": "TIMEOUT", "13_4": "CANCELLED"}


@pytest.fixture
def sacct(tmp_path, monkeypatch):
    """``sacct(text)`` is a sacct that does what the shell lines say."""

    def make(lines):
        (tmp_path / "sacct").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "sacct").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def test_a_cluster_without_accounts_is_no_error_and_accounts_that_do_not_answer_are_one(sacct):
    sacct("echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert accounting.ended({"5"}) == {}
    sacct("echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1")
    with pytest.raises(UserError, match="Connection refused"):
        accounting.ended({"5"})
    sacct('echo "$*" | /bin/grep -q -- --jobs=5,6 && echo "5|OUT_OF_MEMORY"')
    assert accounting.ended({"6", "5"}) == {"5": "OUT_OF_MEMORY"}


MINE, EARLIER = "5", "4"
PENDING = {reason: Queued("PENDING", reason) for reason in ("Dependency", "BeginTime", "None")}
RUNNING, COMPLETING = Queued("RUNNING", "None", "gpu1"), Queued("COMPLETING", "None", "gpu1")


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({}, Verdict("not started")),
        ({"unmet": "needs a, which failed"}, Verdict("not started", "needs a, which failed")),
        ({"status": status("running")}, Verdict("running", live=True)),
        ({"status": status("running"), "gone": True}, Verdict("lost")),
        ({"status": status("preempted"), "cancelled": True}, Verdict("cancelled")),
        ({"status": status("done", finished="2026-01-01"), "launched": "2026-01-02"}, Verdict("up to date")),
        ({"status": status("done", finished="2026-01-02"), "launched": "2026-01-01"}, Verdict("done")),
        # in SLURM's queue
        ({"slurm_id": MINE, "queued": PENDING["None"]}, Verdict("queued", live=True)),
        ({"slurm_id": MINE, "queued": PENDING["Dependency"]}, Verdict("queued", "Dependency", True)),
        ({"slurm_id": MINE, "queued": RUNNING}, Verdict("starting", live=True)),
        ({"slurm_id": MINE, "queued": RUNNING, "status": status("failed", EARLIER)}, Verdict("starting", live=True)),
        ({"slurm_id": MINE, "queued": RUNNING, "status": status("running", MINE)}, Verdict("running", live=True)),
        ({"slurm_id": MINE, "queued": COMPLETING, "status": status("running", MINE)}, Verdict("ending", live=True)),
        ({"slurm_id": MINE, "queued": COMPLETING, "status": status("done", MINE)}, Verdict("done")),
        (
            {"slurm_id": MINE, "queued": Queued("SUSPENDED"), "status": status("running", MINE)},
            Verdict("running", "SUSPENDED", True),
        ),
        ({"slurm_id": MINE, "queued": Queued("CONFIGURING")}, Verdict("queued", "CONFIGURING", True)),
        (
            {"slurm_id": MINE, "queued": PENDING["BeginTime"], "status": status("preempted", MINE)},
            Verdict("requeued", "BeginTime", True),
        ),
        (
            {"slurm_id": MINE, "queued": PENDING["Dependency"], "status": status("failed", EARLIER)},
            Verdict("queued", "Dependency", True),
        ),
        # SLURM has it no more
        ({"slurm_id": MINE, "status": status("failed", MINE)}, Verdict("failed")),
        (
            {"slurm_id": MINE, "status": status("failed", MINE), "ended": "OUT_OF_MEMORY"},
            Verdict("failed", "ran out of memory"),
        ),
        ({"slurm_id": MINE, "status": status("preempted", MINE)}, Verdict("preempted")),
        ({"slurm_id": MINE, "status": status("preempted", MINE), "cancelled": True}, Verdict("cancelled")),
        (
            {"slurm_id": MINE, "status": status("preempted", MINE), "queued": Queued("CANCELLED")},
            Verdict("cancelled", "by scancel"),
        ),
        ({"slurm_id": MINE, "status": status("running", MINE)}, Verdict("lost", "SLURM has it no more")),
        (
            {"slurm_id": MINE, "status": status("running", MINE), "ended": "TIMEOUT"},
            Verdict("lost", "ran into its time limit"),
        ),
        (
            {"slurm_id": MINE, "status": status("running", MINE), "cancelled": True},
            Verdict("cancelled", "ended before it could save"),
        ),
        # and it left no word of its own
        ({"slurm_id": MINE, "unmet": "needs a, which failed"}, Verdict("cancelled", "needs a, which failed")),
        (
            {"slurm_id": MINE, "unmet": "needs a, which failed", "status": status("preempted", EARLIER)},
            Verdict("cancelled", "needs a, which failed"),
        ),
        ({"slurm_id": MINE, "cancelled": True}, Verdict("cancelled", "before it started")),
        ({"slurm_id": MINE, "ended": "CANCELLED"}, Verdict("cancelled", "by scancel, before it started")),
        ({"slurm_id": MINE, "last_words": lambda: "no python"}, Verdict("failed", "no python")),
        (
            {"slurm_id": MINE, "last_words": lambda: "no python", "ended": "NODE_FAIL"},
            Verdict("failed", "its node failed: no python"),
        ),
        ({"slurm_id": MINE}, Verdict("lost", "SLURM has it no more, and it never started")),
        # somebody went on with it by hand
        (
            {"slurm_id": MINE, "status": status("preempted", started="2026-01-02"), "launched": "2026-01-01"},
            Verdict("preempted"),
        ),
        (
            {"slurm_id": MINE, "status": status("preempted", started="2026-01-01"), "launched": "2026-01-02"},
            Verdict("lost", "SLURM has it no more, and it never started"),
        ),
        # SLURM does not answer
        ({"slurm_id": MINE, "answered": False, "status": status("failed", MINE)}, Verdict("failed")),
        ({"slurm_id": MINE, "answered": False}, Verdict("submitted", live=True)),
        (
            {"slurm_id": MINE, "answered": False, "status": status("running", MINE)},
            Verdict("running", live=True),
        ),
    ],
)
def test_state_and_why(facts, verdict):
    assert decide(Facts(**facts)) == verdict


def test_what_a_job_needs_in_vain_is_named_down_to_the_job_that_failed():
    failed, waiting = Verdict("failed"), Verdict("queued", "Dependency", True)
    assert unmet({"a": Verdict("done"), "b": failed}) == "needs b, which failed"
    assert unmet({"a": Verdict("failed", live=True), "b": waiting}) is None  # it is tried again
    cancelled = Verdict("cancelled", "needs b, which failed")
    assert unmet({"a": waiting, "c": cancelled}) == "needs c, which needs b, which failed"
    assert unmet({"c": Verdict("cancelled", "by scancel")}) == "needs c, which was cancelled"


def test_an_array_is_what_its_parts_are_and_then_what_its_merge_is():
    done, failed = Verdict("done"), Verdict("failed", "no space")
    running, queued = Verdict("running", live=True), Verdict("queued", "Dependency", True)
    cases = [
        ([done, failed, running], queued, running),  # what failed is told in rows of its own
        ([done, failed, Verdict("requeued", "BeginTime", True)], queued, Verdict("requeued", "BeginTime", True)),
        ([done, failed, done], queued, failed),
        ([done, done], queued, Verdict("queued", "merge: Dependency", True)),
        ([done, done], Verdict("starting", live=True), Verdict("merging", live=True)),
        ([done, done], Verdict("failed", "shard missing"), Verdict("failed", "merge: shard missing")),
        ([queued, queued], queued, queued),
        ([done, Verdict("not started")], None, Verdict("running", live=True)),
        ([Verdict("not started")] * 2, None, Verdict("not started")),
    ]
    for parts, merge, whole in cases:
        assert combine(parts, merge, launcher=True) == whole
    assert combine([done, Verdict("not started")], None, launcher=False).state == "preempted"


def test_the_last_words_of_a_job_are_its_own_error_rather_than_sruns(tmp_path):
    assert last_words(tmp_path, "5") is None
    (tmp_path / "5_0_log.out").write_text("submitit INFO (now) - Starting\n")
    (tmp_path / "5_0_log.err").write_text("")
    assert last_words(tmp_path, "5") == "ended without a word"
    (tmp_path / "5_0_log.err").write_text(
        "error: shard 3 is missing\nsrun: error: one-a: task 0: Exited with exit code 1\n"
    )
    assert last_words(tmp_path, "5") == "shard 3 is missing"
    (tmp_path / "5_0_log.err").write_text("srun: error: python: No such file or directory\n")
    assert last_words(tmp_path, "5") == "srun: error: python: No such file or directory"
