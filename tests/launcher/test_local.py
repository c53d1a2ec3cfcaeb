import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import UsageError, UserError
from launcher import local
from launcher.local import exit_status
from stpredict.jobs.config import Resources
from stpredict.run import Run
from tests.processes import bounded


def wait_for(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def has_started(run: Run, ranks: int) -> bool:
    return all((run.path / f"pid_{rank}").exists() for rank in range(ranks))


def pid(run: Run, rank: int) -> int:
    return int((run.path / f"pid_{rank}").read_text())


def signal_when_started(run: Run, ranks: int, *numbers: int) -> None:
    def send():
        wait_for(lambda: has_started(run, ranks))
        for number in numbers:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([75, 0], 75), ([75, 75], 75), ([1, 75], 1), ([2, 1], 2), ([-9, 75], 1), ([-11, 0], 1)],
)
def test_exit_statuses_of_ranks_become_one(codes, expected):
    assert exit_status(codes) == expected


def test_a_job_that_ends_well_leaves_state_config_and_a_log_per_rank(job, fake, tmp_path):
    assert fake("ok", "ok")(job(2)) == 0
    run = Run(tmp_path / "run")
    assert run.status().state == "done"
    assert run.status().fingerprint
    assert "generated: x" in run.config_path.read_text()
    assert "world 2" in run.log_path(1).read_text()


def test_threads_are_the_cores_shared_out_unless_the_job_says_otherwise(job, fake, tmp_path):
    fake("ok")(job(resources=Resources(threads=7)))
    assert "threads 7" in Run(tmp_path / "run").log_path(0).read_text()
    fake("ok")(job(run=tmp_path / "b"))
    assert f"threads {len(os.sched_getaffinity(0))} " in Run(tmp_path / "b").log_path(0).read_text()


def test_when_a_rank_dies_the_others_are_ended_and_its_last_line_is_the_error(job, fake, tmp_path, capsys):
    assert fake("sleep", "crash")(job(2)) == 1
    run = Run(tmp_path / "run")
    assert not psutil.pid_exists(pid(run, 0))
    assert run.status().state == "failed"
    assert run.status().error == "rank 1 ended with status 1; last in its log: RuntimeError: the roof fell in"
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "rank_1.log" in lines[0]


def test_a_rank_that_does_not_hear_sigterm_is_killed_after_the_grace(job, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "GRACE_FAILED_S", 0.3)
    assert fake("deaf", "2")(job(2)) == 2
    assert not psutil.pid_exists(pid(Run(tmp_path / "run"), 0))


def test_the_error_that_the_job_itself_wrote_is_the_one_shown(job, fake, capsys):
    assert fake("fail")(job()) == 1
    assert "evaluate: no videos in /nowhere; give a folder that has some" in " ".join(capsys.readouterr().err.split())


def test_the_error_shown_is_that_of_the_rank_that_failed_first_and_not_what_it_did_to_rank_0(
    job, fake, tmp_path, capsys
):
    assert fake("hurt", "fail")(job(2)) == 1
    assert Run(tmp_path / "run").status().error.startswith("no videos in /nowhere")
    assert "rank_1.log" in capsys.readouterr().err
    assert fake("sleep", "crash")(job(2)) == 1  # the words of an earlier start are not repeated
    assert "the roof fell in" in Run(tmp_path / "run").status().error


def test_a_job_that_is_done_stays_done_when_a_rank_aborts_on_its_way_out(job, fake, tmp_path, capsys):
    assert fake("ok", "abort")(job(2)) == 0
    assert Run(tmp_path / "run").status().state == "done"
    assert "warning: evaluate: done, but rank 1 died of SIGABRT afterwards" in " ".join(capsys.readouterr().err.split())


def test_what_a_rank_leaves_behind_is_ended_with_it_so_that_the_directory_is_free(job, tmp_path):
    run = Run(tmp_path / "run")
    code = "import subprocess; print('child', subprocess.Popen(['sleep', '60'], close_fds=False).pid)"
    assert local.run_job(job(), command=lambda _: [sys.executable, "-c", code]) == 1
    code = f"from stpredict.run import Run; Run({str(run.path)!r}).update_status(state='done'); {code}"
    assert local.run_job(job(), command=lambda _: [sys.executable, "-c", code]) == 0
    children = [int(line.split()[1]) for line in run.log_path(0).read_text().splitlines() if line.startswith("child")]
    wait_for(lambda: not any(psutil.pid_exists(child) for child in children))
    assert local.run_job(job(), command=lambda _: []) == 0  # not in use


def asleep() -> bool:
    """Whether a child of this process still is; one that has ended and was not waited for yet is a zombie."""
    found = (process.info for process in psutil.process_iter(["ppid", "name", "status"]))
    ours = (one["status"] for one in found if (one["ppid"], one["name"]) == (os.getpid(), "sleep"))
    return any(status != psutil.STATUS_ZOMBIE for status in ours)


def test_where_a_rank_cannot_be_started_those_that_were_are_ended(job, fake, tmp_path):
    assert fake("1", "1")(job(2)) == 1
    run = Run(tmp_path / "run")
    run.log_path(1).unlink()
    run.log_path(1).mkdir()
    with pytest.raises(IsADirectoryError):
        local.run_job(job(2), command=lambda _: ["sleep", "60"])
    assert run.status().state == "failed"
    assert "error of the launcher: IsADirectoryError" in run.status().error
    wait_for(lambda: not asleep(), 5)


def test_a_persons_own_folder_is_no_run_directory_and_stays_as_it_is(job, fake, tmp_path):
    own = tmp_path / "run" / "videos" / "holiday.mp4"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(UsageError, match="run is not empty and not a run directory; give another `run`"):
        fake("ok")(job())
    assert list((tmp_path / "run").rglob("*")) == [own.parent, own]


@pytest.mark.parametrize("text", ["learning_rate: 1\n", "[1, 2]\n", "a: [\n"])
def test_a_config_of_something_else_is_not_overwritten(job, fake, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match="not a run directory"):
        fake("ok")(job())
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [("config.yaml", text)]


def test_what_a_start_that_was_killed_leaves_is_no_obstacle(job, fake, tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.yaml.0123.tmp").touch()
    assert fake("ok")(job()) == 0


def test_a_file_system_without_locks_is_one_line(job, fake, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("launcher.rundir.fcntl.flock", flock)
    with pytest.raises(UserError, match=r"its file system has no file locks \(No locks available\).* give a `run`"):
        fake("ok")(job())


def test_a_rank_killed_for_memory_is_named_so(job, fake, tmp_path):
    assert fake("killed")(job()) == 1
    assert "SIGKILL: out of memory?" in Run(tmp_path / "run").status().error


def test_a_death_by_signal_is_the_error_and_not_what_it_did_to_the_other_ranks(job, fake, tmp_path):
    assert fake("hurt", "killed")(job(2)) == 1
    assert Run(tmp_path / "run").status().error.startswith("rank 1 was killed")


def test_ending_with_0_without_finishing_is_a_failure(job, fake, tmp_path):
    assert fake("0")(job()) == 1
    assert Run(tmp_path / "run").status().state == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_stop_signals_reach_the_ranks_which_save_and_end_with_75(job, fake, tmp_path, number):
    run = Run(tmp_path / "run")
    before = signal.getsignal(number)
    signal_when_started(run, 2, number)
    assert fake("save", "save")(job(2)) == 75
    assert run.status().state == "preempted"
    passed_on = signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM  # SIGUSR2 has a SLURM job requeued
    assert run.status().error == f"stopped by {passed_on.name}"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_kills_ranks_that_do_not_stop(job, fake, tmp_path):
    run = Run(tmp_path / "run")
    signal_when_started(run, 1, signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    assert fake("deaf")(job()) == 75
    assert time.monotonic() - began < 10
    assert not psutil.pid_exists(pid(run, 0))


def test_a_preempted_job_continues_and_a_finished_one_is_left_alone(job, fake, tmp_path, capsys):
    run = Run(tmp_path / "run")
    signal_when_started(run, 1, signal.SIGTERM)
    fake("save")(job())
    (run.path / "checkpoint").write_text("kept")
    assert fake("ok")(job()) == 0
    assert (run.path / "checkpoint").read_text() == "kept"
    assert run.log_path(0).read_text().count("=== ") == 2
    capsys.readouterr()
    assert fake("crash")(job()) == 0
    assert "already done" in capsys.readouterr().err


def test_another_config_is_refused_with_the_changed_keys(job, fake):
    fake("ok")(job())
    with pytest.raises(UsageError, match=r"generated: x → y"):
        fake("ok")(job(generated="y"))
    assert fake("crash")(job(resources=Resources(threads=3))) == 0  # changes nothing in the result


def test_a_job_that_failed_before_it_made_anything_may_be_given_another_config(job, tmp_path):
    def failing(run):
        return [sys.executable, "-c", "raise SystemExit(2)"]

    assert local.run_job(job(), command=failing) == 2
    assert local.run_job(job(generated="y"), command=failing) == 2


def test_a_run_directory_in_use_is_refused(job, fake, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="in use"):
            fake("ok")(job())


LAUNCHER = """
import sys
sys.path.insert(0, {folder!r})
from conftest import fake_command
from launcher.local import run_job
from stpredict.jobs.config import EvaluateConfig, Resources
config = EvaluateConfig(run={run!r}, generated="x", resources=Resources(processes=2))
run_job(config, command=fake_command({what!r}, {what!r}))
"""


@pytest.mark.parametrize("what", ["save", "sleep"])
def test_kill_9_of_the_launcher_leaves_no_rank_and_frees_the_directory(job, fake, tmp_path, what):
    run = Run(tmp_path / "run")
    script = LAUNCHER.format(folder=str(Path(__file__).parent), run=str(run.path), what=what)
    launcher = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    wait_for(lambda: has_started(run, 2))
    launcher.kill()
    launcher.wait(timeout=20)
    wait_for(lambda: not any(psutil.pid_exists(pid(run, rank)) for rank in range(2)))
    assert fake("ok", "ok")(job(2)) == 0


def test_ranks_keep_the_lock_while_they_outlive_the_launcher(job, fake, tmp_path):
    run = Run(tmp_path / "run")
    script = LAUNCHER.format(folder=str(Path(__file__).parent), run=str(run.path), what="deaf")
    launcher = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    wait_for(lambda: has_started(run, 2))
    launcher.kill()
    launcher.wait(timeout=20)
    try:
        with pytest.raises(UsageError, match="in use"):
            fake("ok", "ok")(job(2))
    finally:
        for rank in range(2):
            os.kill(pid(run, rank), signal.SIGKILL)


def test_a_rank_whose_launcher_died_before_it_could_tell_ends_at_once():
    code = "from launcher.rank import end_with; end_with(1 << 22)"
    result = bounded([sys.executable, "-c", code])
    assert result.returncode == 1
    assert "is gone" in result.stderr
