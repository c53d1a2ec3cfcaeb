from types import SimpleNamespace

import pytest

from stpredict.training import clock as module
from stpredict.training.clock import StepClock


@pytest.fixture
def at(monkeypatch):
    """The time, to be moved by hand."""
    at = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: at.now)
    return at


def test_times_of_steps_waits_and_what_is_neither(at):
    clock = StepClock()
    for waited, worked, other in ((1, 3, 0), (0, 2, 50), (2, 4, 0)):  # a validation after the second step
        at.now += waited
        clock.data_ready()
        at.now += worked
        clock.step_done()
        at.now += other
        if other:
            clock.skip()
    assert (clock.step_s, clock.steps, clock.waiting_s, clock.elapsed_s) == ([4, 2, 6], 3, 3, 12)
    at.now += 0.5
    clock.drained()  # the GPU had half a second to go
    assert clock.elapsed_s == 12.5
    assert clock.percentiles() == pytest.approx({"step_s_p50": 4, "step_s_p90": 5.6, "step_s_p99": 5.96})
    clock.restart()
    assert (clock.steps, clock.waiting_s) == (0, 0)
