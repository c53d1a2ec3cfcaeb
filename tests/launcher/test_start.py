"""What a rank leaves behind when it ends: status.json from rank 0 alone, and one line about why it failed."""

import errno
import logging
import os
import signal
import socket
import sys
from contextlib import nullcontext

import pytest

from data_pipeline.errors import UsageError
from stpredict.jobs import start as module
from stpredict.jobs.start import start
from stpredict.run import Run
from stpredict.training.signals import StopRequest
from tests.processes import bounded


@pytest.fixture
def rank(job, tmp_path, monkeypatch):
    """``rank(1, error)`` is the exit status of a rank 1 of 2 whose job raises ``error``, and its run. The job gets
    ``signals`` before, and does ``then`` if it goes on."""

    def call(number, error=None, signals=(), then=None):
        def work(config, run):
            for one in signals:
                os.kill(os.getpid(), one)
            if then:
                then()
            if error:
                raise error

        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("stpredict.jobs.evaluate.run", work)
        return start(job(2)), Run(tmp_path / "run")

    handlers, level = list(logging.root.handlers), logging.root.level
    yield call
    logging.root.handlers[:] = handlers  # start sets up a rank's own
    logging.root.setLevel(level)


def test_only_rank_0_writes_the_status(rank):
    code, run = rank(1, UsageError("no videos in /nowhere\ngive others"))
    assert code == 2
    assert run.status() is None
    ((_, said),) = run.errors([1])
    assert (said.error, said.exit_status, said.node) == ("no videos in /nowhere", 2, socket.gethostname())
    code, run = rank(0, RuntimeError("connection closed by peer"))
    assert code == 1
    assert run.status().state == "failed"
    assert run.status().error == "no videos in /nowhere"  # the first to fail knows why


def test_a_new_start_forgets_the_old_error(rank):
    rank(1, ValueError("x"))
    code, run = rank(1)
    assert code == 0
    assert not run.error_path(1).exists()
    code, run = rank(0)
    assert run.status().state == "done"


def wrapped(error):
    try:
        try:
            raise error
        except OSError:
            raise RuntimeError("cannot save")  # noqa: B904 (the context is the point)
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/a.pt"), "/scratch/a.pt"),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), "run"),
    ],
)
def test_a_full_disk_is_one_line(rank, capsys, monkeypatch, error, where):
    monkeypatch.setenv("STPREDICT_DEBUG", "")
    code, run = rank(0, error)
    assert code == 1
    line = "no space left on the device; make room and run again: it continues where it stopped"
    assert run.status().error.endswith(f"{where}: {line}")
    (logged,) = capsys.readouterr().err.splitlines()
    assert logged.endswith(line)


def test_other_errors_of_the_system_are_as_they_were(rank):
    _, run = rank(0, PermissionError(errno.EACCES, "Permission denied", "/x"))
    assert run.status().error == "PermissionError: [Errno 13] Permission denied: '/x'"


def test_the_exit_status_is_kept_when_the_status_file_cannot_be_written(rank, capsys, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("stpredict.run.write_atomically", full)
    code, _ = rank(0)
    assert code == 1
    assert "cannot say there that the job is failed" in capsys.readouterr().err


def test_an_error_names_the_node_and_the_start_of_a_slurm_job(tmp_path, monkeypatch):
    run = Run(tmp_path)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3", "SLURMD_NODENAME": "gpu7"}.items():
        monkeypatch.setenv(name, value)
    run.write_error(0, "x")
    run.write_error(1, "y", node="gpu9")
    assert [(error.start, error.node) for _, error in run.errors([0])] == [("12.3", "gpu7")]
    assert [error.node for _, error in run.errors([1])] == ["gpu9"]


def test_the_first_error_is_the_oldest(tmp_path):
    run = Run(tmp_path)
    assert run.first_error(range(3)) is None
    for rank, at in ((0, 30), (2, 10), (1, 20)):
        run.write_error(rank, f"error of {rank}")
        os.utime(run.error_path(rank), (at, at))
    assert run.first_error(range(2)) == (1, "error of 1")


def test_a_rank_leaves_with_its_status_and_its_words_whatever_its_threads_do():
    code = """
import atexit, os, sys
from launcher.rank import leave
atexit.register(os.abort)
print("last words")
leave(75)
"""
    ended = bounded([sys.executable, "-c", code])
    assert (ended.returncode, ended.stdout) == (75, "last words\n")


@pytest.fixture
def requeued(monkeypatch):
    """The stop signals with which SLURM was asked to requeue the job."""
    asked = []
    monkeypatch.setattr(module, "requeue", lambda received: asked.append(set(received)) or "requeued")
    return asked


def test_a_job_that_does_not_train_is_left_with_75_where_it_is(rank, requeued):
    for number, then in ((signal.SIGTERM, "run again to continue"), (signal.SIGUSR2, "requeued")):
        code, run = rank(0, signals=[number])
        assert code == 75
        assert (run.status().state, run.status().error) == ("preempted", f"stopped; {then}")
    assert requeued == [{signal.SIGUSR2}]


def test_a_job_that_starts_over_each_time_is_not_requeued_for_ever(rank, requeued, monkeypatch):
    for restarts, ended in ((2, 75), (3, 2)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        code, run = rank(0, signals=[signal.SIGUSR2])
        assert code == ended
    assert (run.status().state, len(requeued)) == ("failed", 1)
    assert "not done in 4 starts" in run.status().error
    assert "resources.time" in run.status().error


def test_a_job_that_slurm_requeues_by_itself_says_so(rank, requeued, monkeypatch):
    monkeypatch.setattr(module, "already_requeued", lambda: "SLURM job 12 is requeued")
    _, run = rank(0, signals=[signal.SIGTERM])
    assert (run.status().error, requeued) == ("stopped; SLURM job 12 is requeued", [])


def test_only_rank_0_has_the_job_requeued(rank, requeued):
    code, run = rank(1, signals=[signal.SIGUSR2])
    assert (code, run.status(), requeued) == (75, None, [])


def test_what_goes_wrong_by_the_signal_is_no_failure(rank, requeued, monkeypatch):
    monkeypatch.setattr(module.StopRequest, "raising", nullcontext)  # as in a collective, which heeds no signals
    code, run = rank(0, RuntimeError("connection closed by peer"), signals=[signal.SIGUSR2])
    assert (code, run.status().state, len(requeued)) == (75, "preempted", 1)


def test_a_sigterm_because_another_rank_failed_is_a_failure(rank, requeued):
    rank(1, UsageError("no videos in /nowhere"))
    code, run = rank(0, signals=[signal.SIGTERM])
    assert code == 1
    assert (run.status().state, run.status().error) == ("failed", "no videos in /nowhere")


def test_training_goes_on_to_its_boundary_and_knows_of_a_signal_before(rank, requeued, monkeypatch):
    monkeypatch.setattr(module, "SAVING", {"evaluate"})
    seen = []

    def loop():
        with StopRequest() as stop:
            seen.append(set(stop.received))

    code, run = rank(0, signals=[signal.SIGUSR2, signal.SIGTERM], then=loop)
    assert (code, run.status().state, requeued) == (0, "done", [])
    assert seen == [{signal.SIGUSR2, signal.SIGTERM}]
