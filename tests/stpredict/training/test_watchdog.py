"""Whom the watchdog blames, and what it does to a process whose training hangs alone."""

import sys
import threading
from types import SimpleNamespace

import pytest

from stpredict.run import Run
from stpredict.training.watchdog import Place, Watchdog, culprits
from tests.processes import bounded

ALONE = SimpleNamespace(rank=0, size=1, is_main=True)


def place(marks: int, waits: bool = False) -> Place:
    return Place("host", marks=marks, waits=waits)


@pytest.mark.parametrize(
    ("places", "blamed"),
    [
        ([place(5), place(4), place(5)], [1]),
        ([place(5, waits=True), place(4, waits=True)], [1]),  # behind the others, whatever it waits for
        ([place(4, waits=True), place(4), place(4, waits=True)], [1]),
        ([place(5), place(4, waits=True), place(4), place(5)], [2]),
        ([place(4, waits=True), place(4, waits=True)], [0, 1]),
        ([place(4), place(4)], [0, 1]),
    ],
)
def test_the_one_behind_is_to_blame_or_the_one_that_waits_for_nobody(places, blamed):
    assert culprits(places) == blamed


def test_it_leaves_nothing_behind_when_it_is_stopped(tmp_path):
    before = threading.active_count()
    dog = Watchdog(Run(tmp_path), ALONE, 0.4)
    assert threading.active_count() == before + 1
    dog.stop()
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(5)
    assert threading.active_count() == before
    assert dog._stacks.closed


SLEEPER = """
import sys, time
from types import SimpleNamespace
from stpredict.run import Run
from stpredict.training.watchdog import Watchdog

run, how = Run(sys.argv[1]), sys.argv[2]
if how == "with its disk":
    Watchdog._leave_word = lambda *_: time.sleep(600)
if how == "full disk":
    Watchdog._leave_word = lambda *_: 1 / 0
run.update_status(kind="toy", state="running")
dog = Watchdog(run, SimpleNamespace(rank=0, size=1, is_main=True), 1.0)
for step in range(20):
    if how not in ("ticks", "marks") and step == 10:
        time.sleep(600)  # for ever
    if how == "ticks":
        dog.tick()
    else:
        dog.mark(step, "forward")
    time.sleep(0.1)
dog.stop()
time.sleep(3)  # it is not watched any more
"""


@pytest.mark.parametrize(("how", "code"), [("hangs", 1), ("ticks", 0), ("marks", 0)])
def test_alone_too_a_training_that_hangs_ends_with_its_place_and_stack_and_one_that_works_does_not(tmp_path, how, code):
    done = bounded([sys.executable, "-c", SLEEPER, str(tmp_path), how], timeout_s=60)
    assert done.returncode == code, done.stderr
    run = Run(tmp_path)
    if code:
        error = run.status().error
        assert error.startswith("nothing has moved for 1 s (training.guards.hang_timeout_s): rank 0 on ")
        assert "is at step 9, forward, in <module> (<string>:" in error
        assert run.first_error([0]) == (0, error)
        assert "in <module>" in run.log_path(0).read_text()  # the stack, wherever standard error goes
    else:
        assert run.status().state == "running"
        assert run.log_path(0).read_text() == ""


@pytest.mark.parametrize("how", ["with its disk", "full disk"])
def test_it_ends_even_where_nothing_can_be_written(tmp_path, how):
    assert bounded([sys.executable, "-c", SLEEPER, str(tmp_path), how], timeout_s=60).returncode == 1
