import math

import pytest
from pydantic import ValidationError

from stpredict.training.config import ScheduleConfig, TrainingConfig
from stpredict.training.schedule import learning_rate_factor


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


def test_warmup_rises_to_one_and_decay_ends_at_final():
    for kind in ("linear", "cosine"):
        values = factors(ScheduleConfig(kind=kind, warmup_steps=4, final=0.1), 11)
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert values[-1] == pytest.approx(0.1)
        assert values[4:] == sorted(values[4:], reverse=True)


def test_shapes_in_the_middle():
    assert learning_rate_factor(ScheduleConfig(kind="linear"), 25, 101) == pytest.approx(0.75)
    assert learning_rate_factor(ScheduleConfig(kind="cosine"), 25, 101) == pytest.approx(
        (1 + math.cos(math.pi / 4)) / 2
    )
    assert factors(ScheduleConfig(kind="constant"), 3) == [1, 1, 1]


def test_warmup_as_a_share_of_all_steps():
    assert learning_rate_factor(ScheduleConfig(warmup_ratio=0.1), 9, 100) < 1
    assert learning_rate_factor(ScheduleConfig(warmup_ratio=0.1), 10, 100) == 1


def test_two_warmups_or_bf16_without_master_weights_are_refused():
    with pytest.raises(ValidationError, match="not both"):
        ScheduleConfig(warmup_steps=1, warmup_ratio=0.1)
    with pytest.raises(ValidationError, match="no fp32 master weights"):
        TrainingConfig(steps=1, batch_size=1, zero_stage=0, precision="bf16")
