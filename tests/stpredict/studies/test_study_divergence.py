import math

import numpy as np
import pytest

from stpredict.run import Status
from stpredict.studies.divergence import how_it_diverged
from stpredict.training.config import GuardsConfig
from stpredict.training.guards import Guards

DONE = Status(kind="prior", state="done")
FALLING = [(step, 2 + 5 * math.exp(-step / 100)) for step in range(10, 510, 10)]


def noisy(losses, deviation: float, seed: int):
    noise = np.random.default_rng(seed).normal(0, deviation, len(losses))
    return [(step, loss + float(more)) for (step, loss), more in zip(losses, noise, strict=True)]


def test_over_fitting_is_no_divergence():
    rising = [(step, 2 + step / 100) for step, _ in FALLING]
    assert how_it_diverged(DONE, rising, FALLING) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named_with_its_step(value):
    validations = [(100, 3.0), (200, value), (300, 3.0)]
    assert how_it_diverged(DONE, validations, FALLING) == "its validation at step 200 is not finite"
    assert "step 510 is not finite" in how_it_diverged(DONE, [], [*FALLING, (510, value)])


def test_a_training_that_its_guards_gave_up_diverged_and_one_that_failed_otherwise_did_not():
    guards = Guards(GuardsConfig(max_bad_steps=3))
    for step in range(3):
        guards.refuses(step, math.nan, finite=True)
        guards.took(step, applied=False)
    for error in (guards.why(), "runs/x: the state of step 7 is not finite and not saved: model/head.weight"):
        assert error in how_it_diverged(Status(kind="prior", state="failed", error=error), [], FALLING)
    assert how_it_diverged(Status(kind="prior", state="failed", error="CUDA out of memory"), [], FALLING) is None


def test_a_training_loss_that_ends_above_its_beginning_diverged():
    back_up = [*FALLING[:25], *((step, 7.0) for step, _ in FALLING[25:])]
    assert "its training loss ended at" in how_it_diverged(DONE, [], noisy(back_up, 0.05, 0))
    assert "ended at 30, above the 7" in how_it_diverged(DONE, [], [(10, 7.0), (20, 30.0)])


def test_a_running_training_may_come_back():
    grown = [(step, loss + step / 10) for step, loss in FALLING]
    assert how_it_diverged(Status(kind="prior", state="running"), [], grown) is None
    assert how_it_diverged(DONE, [], grown) is not None


def test_one_bad_step_at_the_end_or_a_lucky_one_at_the_beginning_is_no_divergence():
    assert how_it_diverged(DONE, [], [(0, 0.1), *FALLING[:-1], (500, 50.0)]) is None


def test_a_training_that_wobbles_where_it_began_did_not_diverge():
    level = [(step, 2.0) for step, _ in FALLING]
    assert [how_it_diverged(DONE, [], noisy(level, 0.1, seed)) for seed in range(50)] == [None] * 50


def test_nothing_is_said_of_a_training_that_wrote_nothing():
    assert how_it_diverged(None, [], []) is None
    assert how_it_diverged(DONE, [], [(1, 7.0)]) is None
