"""Going back to a checkpoint at awkward moments, and what else is going on then, in two real ranks. A run ends as one
whose data never had the samples that are gone past."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints, folder_of, read_state, why_unusable
from tests.distributed.kills import CONFIGS, Nursery, last_lines
from tests.distributed.kills import trial as kill_trial
from tests.distributed.test_engine import assert_same_bits, whole_state
from tests.distributed.toy import repeatable

FP32 = list(CONFIGS)[1]


def bad(*steps: int) -> dict[int, str]:
    """All samples of these steps, from 0."""
    return {number: "nan" for step in steps for number in range(step * 8, step * 8 + 8)}


def trial(run: str, *, checkpoint: dict | None = None, more: dict | None = None, **changes) -> dict:
    """Eight steps in fp32 under ZeRO-3, saved every other one; after three bad ones in a row it goes back."""
    found = kill_trial(FP32)
    training = {
        **found["training"],
        "steps": 8,
        "validate_every": 2,
        "early_stopping": {"metric": "l2", "mode": "min", "patience": 100, "min_delta": 0.01},
        "checkpoint": {"every": 2, "keep": 2, **(checkpoint or {})},
        "guards": {"max_bad_steps": 3},
        **(more or {}),
    }
    return {**found, "run": run, "training": training, **changes}


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def out(nursery, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rollbacks")
    preempted = trial("preempted", poison=bad(4, 5, 6))
    profiled = {"profile": {"step": 7, "steps": 2}}
    starts = [
        [
            trial("at_the_end", poison=bad(5, 6, 7)),
            trial("at_the_end_without", without=[32, 32]),
            trial("last_skipped", poison=bad(7)),
            trial("stopped", until=7),
        ],
        [
            trial("profiled", poison=bad(4, 5, 6), more=profiled),
            {**preempted, "until": 6},
            preempted,
            trial("from_2_past_8", without=[16, 48]),
            trial("from_2_past_7", without=[16, 40]),
            trial("from_4_past_7", without=[32, 24]),
        ],
    ]
    for number, trials in enumerate(starts):
        ended = nursery.start(trials, out, out / f"log_{number}")
        assert ended["signals"] == [0, 0], last_lines(out / f"log_{number}")
    return out


def state(run: Run):
    return read_state(complete_checkpoints(run.checkpoints)[-1])


def assert_ended_alike(ours: Run, without: Run) -> None:
    """Weights, moments, averages, buffers, early stopping, and lines but for what was skipped."""
    assert_same_bits(whole_state(ours), whole_state(without))
    assert state(ours).step == state(without).step == 8
    assert state(ours).waiting == state(without).waiting
    rows, others = ([repeatable(row) | {"steps_skipped": None} for row in run.metrics()] for run in (ours, without))
    assert rows == others
    events = EventAccumulator(str(ours.tensorboard)).Reload()
    for split, name in (("train", "loss"), ("val", "l2")):
        shown = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(f"{split}/{name}")]
        assert [(row["step"], row[name]) for row in ours.metrics() if row["split"] == split] == shown


def test_at_the_very_last_step(out):
    ours = Run(out / "at_the_end")
    assert_ended_alike(ours, Run(out / "at_the_end_without"))
    guards = state(ours).guards
    assert (guards.rollbacks, guards.steps_skipped, guards.bad_in_a_row) == (1, 3, 0)
    assert ours.status().step == 8


def test_a_last_step_that_is_bad_is_skipped_and_the_checkpoint_of_it_is_there(out):
    ours, stopped = Run(out / "last_skipped"), Run(out / "stopped")
    assert (state(ours).step, state(ours).guards.steps_skipped, state(ours).optimizer_steps["model"]) == (8, 1, 7)
    assert state(stopped).step == 7
    assert_same_bits(whole_state(ours), whole_state(stopped))


def test_a_profile_that_it_cuts_off_begins_again_and_holds_the_steps_that_were_asked_for(out):
    for trace in (Run(out / "profiled").path / "profiles").iterdir():
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        marked = Counter(event["name"] for event in events if event.get("name", "").startswith("training step "))
        assert {name: marked[name] for name in marked} == dict.fromkeys(
            ("training step 7", "training step 8"), marked["training step 7"]
        )
    assert "no profile: steps 7 to 8 were not all made" in last_lines(out / "log_1", 10**6)


def test_after_a_stop_amid_bad_steps_they_are_still_counted(out):
    ours = Run(out / "preempted")
    guards = state(ours).guards
    assert (guards.rollbacks, guards.steps_skipped, guards.bad_in_a_row) == (1, 3, 0)
    assert state(ours).step == 8


def test_past_a_damaged_checkpoint_to_the_one_before(nursery, out, tmp_path):
    trials = [trial("run", poison=bad(5, 6, 7))]
    ended = nursery.start(trials, tmp_path, tmp_path / "log", fault="damaged_before_going_back")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    ours = Run(tmp_path / "run")
    assert_ended_alike(ours, Run(out / "from_2_past_8"))
    assert complete_checkpoints(ours.checkpoints) == [folder_of(ours.checkpoints, step) for step in (6, 8)]
    assert [why_unusable(folder) for folder in complete_checkpoints(ours.checkpoints)] == [None, None]


def test_while_a_checkpoint_is_being_written_to_that_one(nursery, out, tmp_path):
    ended = nursery.start([trial("run", poison=bad(4, 5, 6))], tmp_path, tmp_path / "log", fault="slow_disk")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    assert_ended_alike(Run(tmp_path / "run"), Run(out / "from_4_past_7"))


def test_while_a_checkpoint_is_being_written_that_cannot_be(nursery, out, tmp_path):
    trials = [trial("run", poison=bad(4, 5, 6), checkpoint={"on_failure": "continue"})]
    ended = nursery.start(trials, tmp_path, tmp_path / "log", fault="fails_late_on_rank_1")
    assert ended["signals"] == [0, 0], last_lines(tmp_path / "log")
    assert_ended_alike(Run(tmp_path / "run"), Run(out / "from_2_past_7"))
    assert "training goes on without a checkpoint" in last_lines(tmp_path / "log", 10**6)
