"""Jobs that need no torch: the executor runs tests/launcher/fake_rank.py in place of real ranks."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from launcher.local import run_job, running
from stpredict.jobs.config import EvaluateConfig, Resources

FAKE_RANK = Path(__file__).parent / "fake_rank.py"


@pytest.fixture(autouse=True)
def _no_ranks_around(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)


@pytest.fixture
def fake():
    """``fake("ok", "crash")`` is a run_job whose rank 0 succeeds and whose rank 1 crashes."""
    return lambda *ranks: partial(run_job, command=fake_command(*ranks))


@pytest.fixture
def fake_running():
    """The same as a job that goes on, for LocalExecutor."""
    return lambda *ranks: partial(running, command=fake_command(*ranks))


def fake_command(*ranks: str):
    return lambda run: [sys.executable, str(FAKE_RANK), str(run.path), str(os.getpid()), json.dumps(ranks)]


@pytest.fixture
def job(tmp_path):
    """``job(2)`` is the config of a job of two processes, in tmp_path/run."""

    def make(processes: int = 1, **changes):
        resources = Resources(processes=processes)
        return EvaluateConfig(**{"run": tmp_path / "run", "generated": "x", "resources": resources, **changes})

    return make
