import json
import math

import pytest

from stpredict.training.checkpoint import CheckpointState
from stpredict.training.config import EarlyStoppingConfig, TrainingConfig
from stpredict.training.early_stopping import EarlyStopping, Waiting


def ends_at(values: list[float], **config) -> int | None:
    """The number, from 0, of the value after which it is over."""
    stopping = EarlyStopping(EarlyStoppingConfig(metric="psnr", **config))
    for number, value in enumerate(values):
        stopping.judge(number, {"psnr": value})
        if stopping.over:
            return number
    return None


@pytest.mark.parametrize(
    ("values", "config", "end"),
    [
        ([1, 2, 3, 4], {"patience": 1}, None),
        ([3, 2, 1, 0], {"patience": 2}, 2),
        ([3, 2, 4, 4, 4], {"patience": 2}, 4),  # what is equal is no better
        ([3, 2, 1, 0], {"patience": 2, "mode": "min"}, None),
        ([1, 2, 3, 3], {"patience": 2, "mode": "min"}, 2),
        ([10, 10.4, 10.8, 11.2], {"patience": 2, "min_delta": 0.5}, None),  # against the best, not the last
        ([10, 10.4, 10.5, 11.2], {"patience": 2, "min_delta": 0.5}, 2),
        ([math.nan, math.nan, 1], {"patience": 2}, 1),
        ([math.nan, 1, math.nan, 2], {"patience": 2}, None),
        ([math.inf, 1, 2], {"patience": 2}, 2),
    ],
)
def test_it_is_over_after_so_many_validations_without_improvement(values, config, end):
    assert ends_at(values, **config) == end


def test_the_reason_names_what_was_demanded():
    stopping = EarlyStopping(EarlyStoppingConfig(metric="psnr", patience=1, min_delta=0.5))
    for step, value in ((10, 1.0), (20, 1.25)):
        stopping.judge(step, {"psnr": value})
    assert stopping.reason == "psnr of the last 1 validations: none better than 1 of step 10 by more than 0.5"


def test_its_state_survives_the_checkpoint_even_when_the_best_is_infinite():
    stopping = EarlyStopping(EarlyStoppingConfig(metric="psnr", patience=2))
    for step, value in ((10, 1.0), (20, math.inf), (30, 5.0)):
        stopping.judge(step, {"psnr": value})
    fields = {"step": 30, "samples_consumed": {}, "quarantined": {}, "world_size": 1, "zero_stage": 2}
    fields |= {"precision": "fp32", "optimizer_steps": {}, "config": {}, "export": {}}
    state = CheckpointState(**fields, waiting=stopping.waiting)
    read = CheckpointState.model_validate_json(state.model_dump_json())
    assert read.waiting == Waiting(metric="psnr", mode="max", best=math.inf, step=20, since=1)
    assert CheckpointState.model_validate_json(json.dumps(fields)).waiting is None  # one that is older

    again = EarlyStopping(EarlyStoppingConfig(metric="psnr", patience=2))
    again.go_on_from(read.waiting)
    again.judge(40, {"psnr": 6.0})
    assert again.over
    assert "none better than inf of step 20" in again.reason
    other = EarlyStopping(EarlyStoppingConfig(metric="mse", mode="min", patience=2))
    other.go_on_from(read.waiting)
    assert other.waiting == Waiting(metric="mse", mode="min")


def test_a_run_older_than_the_key_has_the_same_settings():
    assert "early_stopping" not in TrainingConfig(steps=1, batch_size=1).model_dump()
