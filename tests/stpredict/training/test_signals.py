import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from stpredict.training.engine import Trainer
from stpredict.training.signals import Preempted, StopRequest, sparing_children

BOTH = (signal.SIGTERM, signal.SIGUSR2)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_a_flag_and_the_handlers_before_come_back(number):
    before = [signal.getsignal(other) for other in BOTH]
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == {number, signal.SIGTERM}
    assert [signal.getsignal(other) for other in BOTH] == before


def test_a_signal_before_the_loop_is_seen_in_it_and_one_in_it_after_it():
    with StopRequest() as start:
        with StopRequest() as loop:
            assert not loop
            os.kill(os.getpid(), signal.SIGTERM)
        assert start
        with StopRequest() as loop:
            assert loop.received == {signal.SIGTERM}
    with StopRequest() as another:
        assert not another


def test_what_may_be_left_anywhere_is_left_at_once_and_cleans_up_undisturbed():
    done = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            done.append("went on")
        except Exception:  # as around a decoder, which must not take the signal for its own error
            done.append("swallowed")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("cleaned up")

    with StopRequest() as stop:
        with pytest.raises(Preempted), stop.raising():
            work()
        assert done == ["cleaned up"]
        with pytest.raises(Preempted), stop.raising():
            raise AssertionError("a signal before is heeded at once")
        os.kill(os.getpid(), signal.SIGUSR2)  # outside it is a flag again


def test_a_compiler_is_spared_and_the_signal_not_lost():
    with StopRequest() as stop:
        with sparing_children():
            compiler = subprocess.Popen(["sleep", "30"])
            for process in (compiler.pid, os.getpid()):
                os.kill(process, signal.SIGUSR2)
            time.sleep(0.2)
            assert compiler.poll() is None
        assert stop
        compiler.kill()
        compiler.wait()


@pytest.mark.parametrize(("step", "says"), [(3, "3 of 9 (no step in this start: it needs more time);"), (4, "4 of 9;")])
def test_a_training_that_was_stopped_before_its_first_step_says_that_it_needs_more_time(step, says):
    ranks = SimpleNamespace(is_main=False, barrier=lambda: None)
    trainer = SimpleNamespace(step=step, training=SimpleNamespace(steps=9), ranks=ranks)
    with pytest.raises(Preempted) as stopped:
        Trainer._leave_preempted(trainer, set(), began=3)
    assert str(stopped.value) == f"stopped at step {says} run again to continue"
