import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.isolated import Failure, isolated
from tests.processes import bounded

ROOT = Path(__file__).parents[2]


def obey(item):
    """Does what the item says, in a worker."""
    what, value = item
    match what:
        case "return":
            return value
        case "sleep":
            time.sleep(value)
            return value
        case "die":
            os.kill(os.getpid(), value)
        case "leave":
            os._exit(value)
        case "raise":
            raise LookupError(value)
        case "pid":
            return os.getpid()
        case "die later":  # with the answer given
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, value)
            return "answered"


@pytest.mark.parametrize("workers", [1, 3])
def test_deaths_and_hangs_are_put_on_the_item_that_caused_them_and_on_no_other(workers):
    items = [("return", index) for index in range(20)]
    items[3], items[4] = ("die", signal.SIGSEGV), ("leave", 7)
    items[9], items[12] = ("sleep", 60), ("die", signal.SIGKILL)
    expected = [value for _, value in items]
    expected[3] = Failure("the process that read it died (SIGSEGV)")
    expected[4] = Failure("the process that read it died (exit status 7)")
    expected[9] = Failure("took longer than 2 s")
    expected[12] = Failure("the process that read it died (SIGKILL)")
    assert list(isolated(obey, items, workers=workers, timeout_s=2)) == expected


def test_a_death_between_two_items_costs_no_item():
    def items():
        yield "die later", 0.05
        time.sleep(0.5)
        yield "return", 1
        yield "return", 2

    assert list(isolated(obey, items(), workers=1, timeout_s=5)) == ["answered", 1, 2]


def test_results_come_in_order_and_items_are_taken_only_a_few_ahead():
    taken = []

    def items():
        for index in range(30):
            taken.append(index)
            yield ("sleep", 0.02 if index % 3 == 0 else 0)

    for done, _ in enumerate(isolated(obey, items(), workers=2, timeout_s=5)):
        assert len(taken) <= done + 1 + 4
    assert len(taken) == 30


def test_an_error_of_the_function_is_raised_here_with_its_traceback():
    with pytest.raises(LookupError, match="no such thing") as caught:
        list(isolated(obey, [("raise", "no such thing")], workers=1, timeout_s=5))
    assert "in obey" in caught.value.__notes__[0]


def test_large_results_pass_whole():
    big = os.urandom(20_000_000)
    assert list(isolated(obey, [("return", big)] * 3, workers=2, timeout_s=20)) == [big] * 3


def test_workers_are_gone_when_the_results_are_no_longer_wanted():
    results = isolated(obey, [("pid", None), ("sleep", 60), ("sleep", 60)], workers=2, timeout_s=60)
    pid = next(results)
    results.close()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_script_that_starts_workers_at_its_top_level_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from data_pipeline.isolated import isolated\nprint(list(isolated(abs, [-1], workers=1, timeout_s=9)))\n"
    )
    ended = bounded([sys.executable, script], timeout_s=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1
    assert "UserError: a worker process died as it began (exit status 1)" in ended.stderr
