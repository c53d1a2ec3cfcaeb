"""Schedules against those of torch.optim.lr_scheduler, at every step."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR

from stpredict.training.config import OptimizerConfig, ScheduleConfig
from stpredict.training.schedule import apply_schedule, learning_rate_factor

PEAK = 3e-4


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


def adam() -> torch.optim.Adam:
    return torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=PEAK, betas=(0.9, 0.98))


def ours(schedule: ScheduleConfig, steps: int) -> list[tuple[float, float, float]]:
    """Learning rate and betas of an optimizer, at every step."""
    optimizer, settings = adam(), OptimizerConfig(lr=PEAK, betas=(0.9, 0.98))
    found = []
    for step in range(steps):
        apply_schedule(optimizer, settings, schedule, step, steps)
        found.append(state_of(optimizer))
    return found


def theirs(make, steps: int) -> list[tuple[float, float, float]]:
    optimizer = adam()
    scheduler, found = make(optimizer), []
    for step in range(steps):
        found.append(state_of(optimizer))
        if step < steps - 1:  # after the last step of one_cycle, torch divides by zero where pct_start is 1
            optimizer.step()
            scheduler.step()
    return found


def state_of(optimizer: torch.optim.Adam) -> tuple[float, float, float]:
    (group,) = optimizer.param_groups
    return float(group["lr"]), *map(float, group["betas"])


def assert_equal_at_every_step(schedule: ScheduleConfig, make, steps: int) -> None:
    for one, other in zip(ours(schedule, steps), theirs(make, steps), strict=True):
        assert one == pytest.approx(other, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 101, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pct_start": 0.05, "div_factor": 10.0, "final_div_factor": 100.0},
        {"pct_start": 0.0},
        {"pct_start": 1.0},
        {"cycle_momentum": False},
        {"base_momentum": 0.8, "max_momentum": 0.9},
    ],
)
def test_one_cycle_is_torchs(settings, steps):
    schedule = ScheduleConfig(kind="one_cycle", one_cycle=settings)
    if settings.get("pct_start", 0.3) * steps == 1:  # torch divides by zero there
        assert ours(schedule, steps)[0][0] == PEAK
    else:
        assert_equal_at_every_step(schedule, lambda o: OneCycleLR(o, PEAK, total_steps=steps, **settings), steps)


def test_one_cycle_with_its_defaults_is_written_out():
    found = ours(ScheduleConfig(kind="one_cycle"), 101)
    assert found[0] == pytest.approx((PEAK / 25, 0.95, 0.98))
    assert min(beta for _, beta, _ in found) == pytest.approx(0.85, abs=1e-3)
    assert found[-1] == pytest.approx((PEAK / 25e4, 0.95, 0.98))
    assert ScheduleConfig(kind="one_cycle").one_cycle.div_factor == 25


def test_cosine_is_torchs_whatever_its_end():
    steps = 57
    for final in (0.0, 0.1):
        schedule = ScheduleConfig(kind="cosine", final=final)
        assert_equal_at_every_step(
            schedule, lambda o, final=final: CosineAnnealingLR(o, T_max=steps - 1, eta_min=PEAK * final), steps
        )


def test_linear_is_torchs():
    steps = 57
    make = lambda o: LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=steps - 1)  # noqa: E731
    assert_equal_at_every_step(ScheduleConfig(kind="linear", final=0.1), make, steps)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 12}, {"warmup_ratio": 0.1}])
def test_warmup_and_decay_are_their_closed_forms(kind, warmup):
    steps, rise, final = 120, 12, 0.2

    def closed(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        left = 1 - (step - rise) / (steps - 1 - rise)
        fall = {"constant": 1.0, "linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2}[kind]
        return final + (1 - final) * fall if kind != "constant" else 1.0

    schedule = ScheduleConfig(kind=kind, final=final, **warmup)
    assert_equal_at_every_step(schedule, lambda o: LambdaLR(o, closed), steps)


def test_warmup_rises_to_one_and_decay_ends_at_final():
    for kind in ("linear", "cosine"):
        values = factors(ScheduleConfig(kind=kind, warmup_steps=4, final=0.1), 11)
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert values[-1] == pytest.approx(0.1)
        assert values[4:] == sorted(values[4:], reverse=True)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValidationError, match="not both"):
        ScheduleConfig(warmup_steps=1, warmup_ratio=0.1)
    for given in ({"warmup_steps": 5}, {"warmup_ratio": 0.1}, {"final": 0.5}):
        with pytest.raises(ValidationError, match=f"leave out {next(iter(given))}"):
            ScheduleConfig(kind="one_cycle", **given)
    assert ScheduleConfig(kind="one_cycle", warmup_steps=None).one_cycle  # as an override says: none
    with pytest.raises(ValidationError, match="go with kind one_cycle"):
        ScheduleConfig(kind="cosine", one_cycle={})


def test_a_run_older_than_one_cycle_has_the_same_settings():
    assert "one_cycle" not in ScheduleConfig().model_dump()
    dumped = ScheduleConfig(kind="one_cycle").model_dump()
    assert ScheduleConfig.model_validate(dumped).model_dump() == dumped
