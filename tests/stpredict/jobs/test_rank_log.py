"""Where a rank's lines go: a terminal that ranks share gets rank 0's and all warnings, files get everything."""

import logging
import warnings

import pytest

from stpredict.jobs.rank_log import log_to
from stpredict.run import Run


@pytest.fixture
def run(tmp_path):
    handlers, level = list(logging.root.handlers), logging.root.level
    yield Run(tmp_path / "run")
    logging.captureWarnings(False)
    for handler in logging.root.handlers:
        if handler not in handlers:
            handler.close()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def speak(run, rank, shared_terminal):
    log_to(run, rank, 2, shared_terminal)
    logging.getLogger("stpredict.x").info("step 1/2")
    logging.getLogger("stpredict.x").warning("a sample was replaced")
    if shared_terminal:
        warnings.simplefilter("always")  # also the second time
        warnings.warn("that goes away", FutureWarning, stacklevel=1)


def test_a_shared_terminal_gets_rank_0s_lines_and_the_warnings_of_all(run, capsys):
    speak(run, 0, True)
    zero = capsys.readouterr().err
    assert [line.split(" ", 2)[2] for line in zero.splitlines()[:2]] == ["I step 1/2", "W a sample was replaced"]
    speak(run, 1, True)
    one = capsys.readouterr().err
    assert "step 1/2" not in one
    assert "W rank 1: a sample was replaced" in one
    assert "FutureWarning: that goes away" in one
    for rank in (0, 1):
        text = run.log_path(rank).read_text()
        assert text.startswith("=== ")
        assert f"rank {rank} of 2" in text.splitlines()[0]
        assert "I step 1/2" in text
        assert "W a sample was replaced" in text
        assert "FutureWarning: that goes away" in text


def test_a_file_is_added_to_and_made_with_its_first_line(run):
    log_to(run, 1, 2, True)
    assert not run.path.exists()  # of a job that is refused, rank 1 leaves nothing
    speak(run, 1, True)
    speak(run, 1, True)
    assert run.log_path(1).read_text().count("step 1/2") == 2


def test_where_the_launcher_writes_the_file_the_rank_does_not(run, capsys):
    speak(run, 1, False)
    assert "I step 1/2" in capsys.readouterr().err
    assert not run.path.exists()
