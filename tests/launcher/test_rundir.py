"""The lock of a run directory when its launcher was killed."""

import os
import socket
import subprocess
import sys
import time

import pytest

from data_pipeline.errors import UsageError
from launcher.rundir import locked

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
