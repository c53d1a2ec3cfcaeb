"""Ranks that stop for ever, are killed or are slow: what becomes of the training, under the launcher and without it."""

import json
import socket
import sys
import time
from pathlib import Path

import pytest

from launcher import local
from stpredict.jobs.config import EvaluateConfig, Resources
from stpredict.run import Run
from tests.distributed import toy
from tests.distributed.test_engine import trial

TIMEOUT_S = 10.0
WARM = trial(
    "warm", training={"steps": 1, "batch_size": 12, "validate_every": 1, "picture_every": 1}
)  # everything is imported
HOST = socket.gethostname()


def launched(folder: Path, delay: dict, training: dict, ranks: int = 2) -> tuple[int, Run, float]:
    """The toy under the launcher: its exit status, its run, and the seconds since the training began."""
    folder.mkdir()
    quiet = {"validate_every": 100, "picture_every": 100, "checkpoint": {"every": 100}}
    settings = {**quiet, "steps": 6, "guards": {"hang_timeout_s": TIMEOUT_S}, "zero_stage": 2, **training}
    trials = folder / "trials.json"
    trials.write_text(json.dumps([WARM, trial("run", training=settings, delay=delay)]))
    job = EvaluateConfig(run=folder / "run", generated="x", resources=Resources(processes=ranks, threads=1))
    code = local.run_job(job, command=lambda _: [sys.executable, toy.__file__, str(folder), str(trials)])
    return code, Run(folder / "run"), time.time() - (folder / "run" / "metrics.jsonl").stat().st_ctime


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(local, "GRACE_FAILED_S", 5.0)  # for the stacks to be written, on a busy machine too


@pytest.mark.parametrize(
    ("how", "stage", "rank", "phase", "stack"),
    [
        ("data", 2, 1, "waiting for data, in delayed (toy.py:", "in delayed"),
        ("forward", 1, 1, "forward, in delayed (toy.py:", "in delayed"),
        ("forward", 3, 0, "forward, in delayed (toy.py:", "in delayed"),
        ("stop", 2, 1, "waiting for data, in", None),
        ("stop", 2, 0, None, None),  # whose process holds the store
        ("hold", 2, 1, "waiting for data, in", "in delayed"),
    ],
)
def test_a_rank_that_stops_for_ever_ends_the_training_in_time_and_is_named(tmp_path, how, stage, rank, phase, stack):
    delay = {"ranks": [rank], "how": how, "s": 600, "from_call": 3}
    code, run, took_s = launched(tmp_path / "job", delay, {"zero_stage": stage})
    error = run.status().error
    assert code == 1
    assert took_s < 5 * TIMEOUT_S
    assert error.startswith(f"nothing has moved for {TIMEOUT_S:g} s (training.guards.hang_timeout_s): rank {rank} ")
    if phase:
        assert f"rank {rank} on {HOST}" in error
        assert f"step 3, {phase}" in error
        assert f"rank {1 - rank} on" not in error
    if stack:
        assert stack in run.log_path(rank).read_text().partition("most recent call first")[2]
    assert "Its threads:" in run.log_path(1 - rank).read_text()  # the witness says where it stands, too


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_within_seconds_and_is_named(tmp_path, rank, capsys):
    delay = {"ranks": [rank], "how": "kill", "from_call": 3}
    code, run, took_s = launched(tmp_path / "job", delay, {"guards": {}})
    assert code == 1
    assert took_s < 20
    assert f"rank {rank} was killed (SIGKILL: out of memory?)" in run.status().error


def test_ranks_that_were_joined_without_the_launcher_end_when_one_is_killed(tmp_path):
    started = time.monotonic()
    delay = {"ranks": [1], "how": "kill", "from_call": 3}
    with pytest.raises(AssertionError, match=r"losed by peer|reset by peer"):
        toy.run_ranks([trial("run", delay=delay)], tmp_path, 2, timeout_s=300)
    assert time.monotonic() - started < 240  # seconds, on a busy machine; collectives would wait for half an hour


SLOW = {"steps": 10, "zero_stage": 2, "log_every": 2, "validate_every": 100, "picture_every": 100}


@pytest.mark.parametrize(
    ("ranks", "how", "word"),
    [([2], "data", "waiting for data"), ([1], "forward", "its forward passes"), ([0, 1, 2], "forward", None)],
)
def test_a_rank_slower_than_the_others_is_named_once_and_none_where_all_are(tmp_path, ranks, how, word):
    delay = {"ranks": ranks, "how": how, "s": 0.1}
    _, run, _ = launched(tmp_path / "job", delay, {**SLOW, "batch_size": 12, "guards": {}}, ranks=3)
    text = run.log_path(0).read_text()
    named = [line for line in text.splitlines() if "is slower than the others, by its device" not in line]
    named = [line for line in named if "is slower than the others" in line]
    assert len(named) == (1 if word else 0), named
    if word:
        assert f": rank {ranks[0]} on {HOST} is slower than the others, by {word}: " in named[0]
