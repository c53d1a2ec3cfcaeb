import io
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta

from rich.console import Console

from launcher.overview import Row, rows
from launcher.progress import Watch, format_seconds
from launcher.status import folded, show
from stpredict.run import Progress, Run, Status


def ago(seconds):
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def write(run, **fields):
    status = Status(**{"kind": "prior", "host": socket.gethostname(), **fields})
    run.path.mkdir(exist_ok=True)
    run.status_path.write_text(status.model_dump_json())


def test_a_running_job_whose_process_is_gone_is_lost(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=20)
    run = Run(tmp_path / "r")
    write(run, state="running", pid=process.pid, started=ago(100), heartbeat=ago(40))
    row = rows(run.path)[0]
    assert row.state == "lost"
    assert 59 <= row.elapsed_s <= 62  # up to its last sign of life
    write(run, state="running", pid=1, started=ago(100), heartbeat=ago(40), eta_s=50)
    row = rows(run.path)[0]
    assert row.state == "running"
    assert 8 <= row.eta_s <= 11


def test_a_process_that_ended_and_was_not_waited_for_is_gone_too(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays a zombie
    run = Run(tmp_path / "r")
    write(run, state="running", pid=process.pid, started=ago(9), heartbeat=ago(1))
    assert rows(run.path)[0].state == "lost"
    process.wait(timeout=20)


def test_a_job_of_another_host_is_never_called_lost(tmp_path):
    run = Run(tmp_path / "r")
    write(run, state="running", pid=2**22, host="elsewhere", heartbeat=ago(-5))  # its clock is ahead of this one
    (row,) = rows(run.path)
    assert (row.state, row.heartbeat_age_s) == ("running", 0.0)


def test_time_left_counts_from_where_this_process_began(tmp_path, monkeypatch):
    at = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr("stpredict.run.time.monotonic", lambda: next(at))
    run = Run(tmp_path)
    run.update_status(kind="prior")
    progress = Progress(run, 1000, "step", interval_s=0)
    progress.update(900)
    assert run.status().eta_s is None
    progress.update(910)
    assert run.status().eta_s == 36.0


def test_seconds_are_written_as_a_clock_does():
    assert [format_seconds(value) for value in (None, 5, 65.4, 3661)] == ["", "0:05", "1:05", "1:01:01"]


def shown(folder, width):
    console = Console(width=width, file=io.StringIO())
    show(rows(folder), console)
    return console.file.getvalue()


def test_80_columns_show_everything_of_a_long_job(tmp_path):
    run = Run(tmp_path / "prior_on_latents")
    values = {"loss": 5.123456, "samples_per_s": 41.25, "mfu": 0.381}
    numbers = {"step": 123_456, "steps": 250_000, "values": values, "eta_s": 93_784}
    write(run, state="running", pid=1, started=ago(42_246), heartbeat=ago(0), **numbers)
    text = shown(run.path, 80)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("prior_on_latents", "running", "123456/250000", "11:44:0", "26:03:0"):
        assert part in text
    assert text.splitlines()[-1] == "prior_on_latents: loss 5.123 41.25 samples/s MFU 38%"
    assert "loss 5.123 41.25 samples/s MFU 38%" in shown(run.path, 120).splitlines()[2]


def failed_part(number):
    return Row(job=f"a.{number}", state="failed", status=Status(kind="shard", state="failed", error="no space"))


def test_of_an_array_whose_parts_failed_alike_the_reason_stands_there_once():
    console = Console(width=80, file=io.StringIO())
    array = Row(
        job="a", state="failed", parts=99, parts_done=49, bad_parts=[failed_part(number) for number in range(50)]
    )
    waiting = Row(job="b", state="queued", reason="Dependency", live=True, slurm_ids=["7_0", "7_1", "8"])
    show([array, waiting], console)
    text = console.file.getvalue()
    assert text.count("no space") == 1
    assert "a.7 " in text
    assert "a.8 " not in text
    assert "a: 42 more parts did not end well; --json has them all" in text
    assert "b: Dependency  SLURM 7,8" in text
    wide = Console(width=160, file=io.StringIO())
    show([array, waiting], wide)
    assert "queued (Dependency)" in wide.file.getvalue()


def test_what_a_training_continues_from_is_said_once(tmp_path):
    run, console = Run(tmp_path), Console(width=200, file=io.StringIO())
    run.update_status(kind="prior", state="running", continued_from=40, step=41, steps=100)
    with Watch(run, "prior", console) as watch:
        watch.show()
        watch.show()
    assert console.file.getvalue().count("prior: continues from the checkpoint of step 40\n") == 1


def test_of_many_trials_those_share_a_row_of_which_there_is_nothing_to_tell(capsys):
    trials = [f"seed{number}" for number in range(40)]
    found = [Row(job="videos", state="done")]
    found += [Row(job=f"{trial}-guess", trial=trial, state="done") for trial in trials]
    found += [Row(job=f"{trial}-judge", trial=trial, state="queued", reason="(Dependency)") for trial in trials]
    found[5].state, found[7].state, found[44].reason = "running", "failed", "(Resources)"
    shown = [(row.job, row.state) for row in folded(found)]
    assert shown == [
        ("videos", "done"),
        ("guess of 38 trials", "done"),
        ("seed4-guess", "running"),
        ("seed6-guess", "failed"),
        ("judge of 39 trials", "queued"),
        ("seed3-judge", "queued"),
    ]
    assert folded(found[:20]) == found[:20]
