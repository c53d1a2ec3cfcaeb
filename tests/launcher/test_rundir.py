"""The lock of a run directory when its launcher was killed."""

import os
import socket
import subprocess
import sys
import time

import pytest

from data_pipeline.errors import UsageError, UserError
from launcher import rundir
from launcher.rundir import locked
from stpredict.run import Run

HOLD = "import sys, time; print('held', flush=True); time.sleep(float(sys.argv[1]))"


@pytest.fixture
def orphan(tmp_path):
    """``orphan(seconds)`` is a process that inherited the lock of tmp_path and holds it that long."""
    children = []

    def start(seconds: float) -> None:
        with locked(tmp_path) as lock:
            child = subprocess.Popen(
                [sys.executable, "-c", HOLD, str(seconds)], pass_fds=[lock.fileno()], stdout=subprocess.PIPE
            )
            children.append(child)
            child.stdout.readline()

    yield start
    for child in children:
        child.kill()
        child.wait(timeout=20)


def test_the_last_processes_of_a_dead_launcher_are_waited_for(tmp_path, orphan):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=20)
    orphan(1.0)
    (tmp_path / ".lock").write_text(f"process {dead.pid} on {socket.gethostname()}\n")
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_living_launcher_is_not_waited_for(tmp_path, orphan):
    orphan(30.0)
    (tmp_path / ".lock").write_text(f"process {os.getppid()} on {socket.gethostname()}\n")
    before = time.monotonic()
    with pytest.raises(UsageError, match=f"is in use by process {os.getppid()} on"), locked(tmp_path):
        pass
    assert time.monotonic() - before < 5


@pytest.fixture
def requeued(monkeypatch):
    """This process is the third start of SLURM job 12."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")


def held_by(folder, start):
    (folder / ".lock").write_text(f"process 1 on lost-node (SLURM job {start})\n")


@pytest.mark.parametrize("start", ["12.0", "12.1"])
def test_an_earlier_start_of_the_same_slurm_job_is_waited_for(tmp_path, orphan, requeued, capsys, start):
    orphan(1.0)
    held_by(tmp_path, start)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().endswith("(SLURM job 12.2)\n")
    said = (
        f"{tmp_path}: waiting up to 180 s for an earlier start of this job, process 1 on lost-node (SLURM job {start})"
    )
    assert capsys.readouterr().err == f"{said}\n"


def test_but_not_for_ever(tmp_path, orphan, requeued, monkeypatch):
    monkeypatch.setattr(rundir, "ORPHANS_END_S", 0.2)
    monkeypatch.setattr(rundir, "STARTS_END_S", 0.5)
    orphan(30.0)
    held_by(tmp_path, "12.1")
    with (
        pytest.raises(UserError, match="an earlier start of this job, process 1 on lost-node") as refused,
        locked(tmp_path),
    ):
        pass
    assert refused.value.exit_status == 1  # a further start may find it free


@pytest.mark.parametrize("start", ["11.0", "12.2", "12.10", "112.0"])
def test_other_slurm_jobs_are_not_waited_for(tmp_path, orphan, requeued, start):
    orphan(30.0)
    held_by(tmp_path, start)
    with pytest.raises(UsageError, match=r"is in use by process 1 on lost-node \(SLURM job"), locked(tmp_path):
        pass


def test_a_job_whose_run_directory_was_removed_says_so(tmp_path):
    run = Run(tmp_path / "run")
    run.update_status(kind="evaluate", state="running")
    run.status_path.unlink()
    with pytest.raises(UserError, match=r"status.json is gone: was the run directory removed while the job ran"):
        run.update_status(step=3)
