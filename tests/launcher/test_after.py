"""What becomes of a SLURM job that did not end well: what happened, and what is decided. tests/slurm has the jobs."""

import fcntl
import os

import pytest
from pydantic import TypeAdapter

from launcher import rundir
from launcher.config import SlurmCluster
from launcher.record import JobRecord, PipelineRun, Record, Submitted
from launcher.slurm.after import Failures, decide, eligible_nodes, expand_nodes, main
from launcher.slurm.failure import Failure, batch_log, rank_log, was_asked, what_happened
from stpredict.config import as_yaml
from stpredict.jobs.config import AnyJobConfig
from stpredict.run import Run

# As srun 22.05 writes, in jobs of two ranks on each of two nodes.
STEP = "srun: launch/slurm: _step_signal: Terminating StepId=5.0\n"
CANCELLED = "slurmstepd-one-a: error: *** STEP 5.0 ON one-a CANCELLED AT 2026-11-21T00:45:34 ***\n"
FIRST = "=== start 1 of job 5 on one-[a-b]\nsrun: error: one-a: task 0: Killed\n"
BEGIN = "=== start 2 of job 5 on one-[a-b]\n"
KILLED = f"srun: error: one-b: task 3: Killed\n{STEP}{CANCELLED}srun: error: one-a: tasks 0-1: Terminated\n"


@pytest.fixture
def happened(tmp_path, monkeypatch):
    """``happened(batch log, errors, logs)``: what the second start of job 5 ended with. ``errors`` are rank → error,
    exit status, start; ``logs`` rank → text."""

    def make(text, errors=(), logs=()):
        run = Run(tmp_path / "run")
        for age, (rank, error, code, node, start) in enumerate(errors):
            monkeypatch.setenv("SLURM_JOB_ID", start.partition(".")[0])
            monkeypatch.setenv("SLURM_RESTART_COUNT", start.partition(".")[2])
            run.write_error(rank, error, code, node)
            os.utime(run.error_path(rank), (age, age))
        rank_log(tmp_path, "5", 0).write_text(FIRST + BEGIN + text)
        for rank, said in dict(logs).items():
            rank_log(tmp_path, "5", rank).write_text(said)
        return what_happened(run, 4, "5.1", tmp_path, "5")

    return make


def test_the_rank_that_failed_first_says_why(happened, tmp_path):
    text = f"srun: error: one-a: task 0: Exited with exit code 1\n{STEP}srun: error: one-b: tasks 2-3: Terminated\n"
    lost = (0, "connection closed by peer", 1, "one-a", "5.1")
    failure = happened(text, [(3, "a stale one", 2, "one-b", "5.0"), (2, "CUDA error", 1, "one-b", "5.1"), lost])
    log = tmp_path / "run" / "logs" / "rank_2.log"
    assert failure == Failure(f"CUDA error (rank 2 on one-b; log: {log})", "one-b", usage=False)


def test_a_rank_killed_without_a_word_explains_the_errors_of_the_others(happened, tmp_path):
    failure = happened(KILLED, [(0, "connection closed by peer", 1, "one-a", "5.1")], {3: "Traceback of a worker\n"})
    said = "rank 3 on one-b was killed (SIGKILL: out of memory?)"
    assert failure == Failure(f"{said} (log: {tmp_path}/5_3_log.err)", "one-b")


def test_one_that_crashes_says_its_last_words(happened, tmp_path):
    text = f"srun: error: one-b: task 2: Segmentation fault\n{STEP}srun: error: one-a: tasks 0-1: Terminated\n"
    failure = happened(text, logs={2: "Fatal Python error: Segmentation fault\n\nslurmstepd-one-b: error: *** STEP\n"})
    said = "rank 2 on one-b died: Segmentation fault; last in its log: Fatal Python error: Segmentation fault"
    assert failure == Failure(f"{said} (log: {tmp_path}/5_2_log.err)", "one-b")


def test_several_ranks_in_one_line_of_srun(happened):
    failure = happened(
        f"srun: error: one-b: tasks 2-3: Exited with exit code 1\n{STEP}", logs={2: "No module named x\n"}
    )
    assert failure.error.startswith("rank 2 on one-b ended with status 1; last in its log: No module named x (log: ")
    assert failure.node == "one-b"
    assert happened("srun: error: one-[a-b]: tasks 0-3: Exited with exit code 1\n").node is None


@pytest.mark.parametrize("code", [1, 2])
def test_bad_usage_is_known_whatever_rank_has_it(happened, code):
    text = f"srun: error: one-a: tasks 0-1: Exited with exit code 1\n{STEP}"
    text += f"srun: error: one-b: tasks 2-3: Exited with exit code {code}\n"
    assert happened(text, logs={0: BEGIN + "error: runs/a is in use\n" + text}).usage == (code == 2)
    errors = [(1, "connection closed by peer", 1, "one-a", "5.1"), (2, "no such key", code, "one-b", "5.1")]
    assert happened(text, errors).usage == (code == 2)


def test_a_missing_python_is_no_bad_usage_though_it_ends_with_2_as_well(happened):
    text = f"srun: error: one-b: tasks 2-3: Exited with exit code 2\n{STEP}"
    why = "execve(): /opt/python: No such file or directory"
    failure = happened(text, logs={2: f"slurmstepd-one-b: error: {why}\n"})
    assert failure.error.startswith(f"rank 2 on one-b ended with status 2; last in its log: {why} (log: ")
    assert (failure.node, failure.usage) == ("one-b", False)


def test_a_node_that_starts_nothing_is_known(happened):
    failure = happened("srun: error: Task launch for StepId=5.0 failed on node gpu-7: Invalid job credential\n")
    assert failure.node == "gpu-7"
    assert failure.error.startswith("Task launch for StepId=5.0 failed on node gpu-7: Invalid job credential (log: ")


def test_where_srun_says_nothing_the_last_words_of_the_log_do(happened):
    assert happened("bash: srun: command not found\n").error.startswith("bash: srun: command not found (log: ")
    assert happened("").error.startswith("ended without a word (log: ")


def test_ranks_that_were_asked_to_stop_have_not_failed():
    saved = "srun: error: one-b: tasks 2-3: Exited with exit code 75\n"
    asked = f"{saved}srun: error: one-a: task 1: User defined signal 2\nsrun: error: one-a: task 0: Terminated\n"
    assert was_asked(asked)
    assert not was_asked(f"srun: error: one-a: task 0: Killed\n{saved}")
    assert not was_asked("bash: srun: command not found\n")


CLUSTER = SlurmCluster(retries=2)
FAILED = Failure("it broke", "b")


def test_a_failed_job_starts_again_without_the_node_that_failed():
    verdict = decide(FAILED, Failures(errors=["x"], excluded=["a"]), CLUSTER, {"b", "c", "d"}, nodes=2)
    assert verdict == (True, ("a", "b"), "start 3 of 3 follows, without b")


def test_where_too_few_nodes_would_be_left_none_is_excluded():
    again, excluded, note = decide(FAILED, Failures(), CLUSTER, {"b", "c"}, nodes=2)
    assert (again, excluded) == (True, None)
    assert note == "start 2 of 3 follows, again with b: too few nodes are left without it"


def test_an_unknown_node_excludes_none():
    assert decide(Failure("x"), Failures(), CLUSTER, {"b"}, nodes=1) == (True, None, "start 2 of 3 follows")


def test_after_the_last_retry_it_has_failed():
    verdict = decide(FAILED, Failures(errors=["x", "y"]), CLUSTER, {"a", "b"}, nodes=1)
    assert verdict == (False, None, "failed 3 times; run again to continue")
    assert decide(FAILED, Failures(), SlurmCluster(retries=0), {"a", "b"}, nodes=1) == (False, None, None)


def test_bad_usage_is_never_tried_again():
    again, _, note = decide(Failure("no such key", "b", usage=True), Failures(), CLUSTER, {"a", "b"}, nodes=1)
    assert (again, note) == (False, "not started again, since it would fail the same way")


def test_nodes_that_work_are_eligible():
    sinfo = """
    a idle all*
    b mixed all*
    c down* all*
    d idle* all*
    e drained all*
    f idle~ all*
    g idle other
    h allocated all*
    i completing all*
    """
    assert eligible_nodes(sinfo, "all", but=["h"]) == {"a", "b", "f", "i"}
    assert eligible_nodes(sinfo, "other", but=[]) == {"g"}


def test_lists_of_nodes_are_expanded():
    expanded = ["gpu003", "gpu004", "gpu9", "login", "x1-ib", "x2-ib"]
    assert expand_nodes("gpu[003-004,9],login,x[1-2]-ib") == expanded
    assert expand_nodes("") == []


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """``ended(log)``: what the run's status.json says after SLURM job 5, of a pipeline's job ``shards``, has ended with
    the batch ``log``, and the exit status of ``after``. ``id`` and ``submitted`` are what the launch has recorded."""
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_JOB_PARTITION": "all", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)

    def make(log, id="5", **submitted):
        pipeline = PipelineRun(tmp_path / "run")
        config = {"kind": "shard", "run": str(pipeline.path / "shards"), "source": {"kind": "moving_digits"}}
        config = TypeAdapter(AnyJobConfig).validate_python(config)
        path = pipeline.config_path("shards")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_yaml(config))
        one = Submitted(slurm_id=id, **submitted)
        job = JobRecord(fingerprint="f", array=3, submitted=[Submitted(slurm_id="4", part=0), one])
        record = Record(pipeline="p", cluster_name="c", cluster=CLUSTER, code="x", launched="now", jobs={"shards": job})
        pipeline.write_record(record)
        logs = pipeline.slurm_folder(one.of("shards"))
        logs.mkdir(parents=True, exist_ok=True)
        batch_log(logs, id).write_text(BEGIN + log)
        code = main([str(pipeline.path), "shards", "--nodes=one-a idle all*\none-b idle all*"])
        return code, Run(config.run if one.merge else config.run / "parts" / "1-of-3").status()

    return make


@pytest.mark.parametrize(
    ("id", "submitted"),
    [("5_1", {"part": 1}), ("5", {"part": 1}), ("5", {"merge": True})],
    ids=["a task", "the only part that was missing, which is no array", "the merge"],
)
def test_the_part_or_the_merge_that_a_job_does_is_told_of(ended, capsys, monkeypatch, id, submitted):
    if "_" in id:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    code, status = ended("srun: error: one-b: task 0: Killed\n", id=id, **submitted)
    assert (code, status.state, status.slurm_job_id) == (0, "pending", id)
    assert status.note.endswith("; start 2 of 3 follows, without one-b")
    assert capsys.readouterr().out == "one-b\n"


def test_a_job_that_the_run_does_not_know_is_not_started_again(ended, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert ended("srun: error: one-b: task 0: Killed\n", part=1) == (2, None)
    assert "record.json: SLURM job 6 is not one of 'shards' there; launch again" in capsys.readouterr().err


def test_a_run_that_an_earlier_start_still_holds_is_left_alone_and_the_job_starts_again(
    ended, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(rundir, "STARTS_END_S", 0.3)
    folder = tmp_path / "run" / "shards" / "parts" / "1-of-3"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        lock.write("process 1 on lost-node (SLURM job 5.0)\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ended("srun: error: one-b: task 0: Exited with exit code 1\n", part=1) == (0, None)
    said = capsys.readouterr()
    assert "an earlier start of this job, process 1 on lost-node (SLURM job 5.0), holds it after" in said.err
    assert said.out == "one-b\n"


def test_failures_are_counted_from_start_to_start_and_the_nodes_of_the_profile_stay_excluded(
    ended, capsys, monkeypatch
):
    monkeypatch.setitem(globals(), "CLUSTER", SlurmCluster(retries=2, exclude="old"))
    ended("srun: error: one-b: task 0: Killed\n", part=1)
    assert capsys.readouterr().out == "old,one-b\n"
    assert ended("srun: error: one-a: task 0: Killed\n", part=1)[1].note.endswith("start 3 of 3 follows, again with "
        "one-a: too few nodes are left without it")  # fmt: skip
    code, status = ended("srun: error: one-a: task 0: Killed\n", part=1)
    assert (code, status.state, status.note) == (1, "failed", "failed 3 times; run again to continue")


def test_the_status_of_another_jobs_work_is_left_alone(ended, tmp_path):
    Run(tmp_path / "run" / "shards" / "parts" / "1-of-3").update_status(kind="shard", state="done", fingerprint="g")
    assert ended("srun: error: one-b: task 0: Killed\n", part=1)[1].state == "done"
