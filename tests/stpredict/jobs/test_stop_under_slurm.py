"""What a job that was asked to stop does under SLURM, against an scontrol that writes down what it is asked;
tests/slurm has a real one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stpredict.jobs import requeue as module
from stpredict.jobs.requeue import already_requeued, job_id, requeue

USR2, TERM = {signal.SIGUSR2}, {signal.SIGTERM}
SCONTROL = """#!{python}
import pathlib, sys
asked = pathlib.Path(__file__).with_name("asked")
with asked.open("a") as file:
    print(*sys.argv[1:], file=file)
if "show" in sys.argv:
    print("JobId=12 {about}")
elif len([line for line in asked.read_text().splitlines() if line.startswith("requeue")]) <= {refusals}:
    sys.exit("Unable to contact slurm controller (connect failure)")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """``slurm(about, refusals)`` puts an scontrol on the path, that describes the job so and fails to requeue it that
    often; returns a function that gives what it was asked to do."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(module, "PAUSE_S", 0.0)

    def make(about="JobState=RUNNING Requeue=1 BatchFlag=1", refusals=0, **environment):
        scontrol = tmp_path / "scontrol"
        scontrol.write_text(SCONTROL.format(python=sys.executable, about=about, refusals=refusals))
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, value in {"SLURM_JOB_ID": "12", "SLURM_STEP_NUM_TASKS": "16", **environment}.items():
            monkeypatch.setenv(name, value)
        return lambda: _requests(tmp_path / "asked")

    return make


def _requests(path: Path) -> list[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith("requeue")]


@pytest.mark.parametrize("received", [USR2, TERM, USR2 | TERM, set()])
def test_a_job_of_several_ranks_requeues_itself_on_either_signal_to_any_rank(slurm, received):
    requests = slurm()
    assert requeue(received) == "SLURM job 12 is requeued and continues by itself"
    assert requests() == ["requeue 12"]


def test_a_job_whose_signal_is_still_on_its_way_requeues_itself(slurm):
    requests = slurm("JobState=SIGNALING Reason=None Requeue=1 BatchFlag=1")
    requeue(USR2)
    assert requests() == ["requeue 12"]


def test_elsewhere_nothing_is_asked(slurm, monkeypatch):
    requests = slurm()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue(USR2) == "run again to continue"
    assert already_requeued() is None
    assert requests() == []


def test_a_task_of_an_array_requeues_itself_and_not_the_array(slurm):
    requests = slurm(SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    requeue(USR2)
    assert requests() == ["requeue 12_3"]
    assert job_id({"SLURM_JOB_ID": "12"}) == "12"
    assert job_id({}) is None


@pytest.mark.parametrize(
    ("about", "why"),
    [
        (
            "JobState=COMPLETING Reason=None Requeue=1 BatchFlag=1",
            "since SLURM is ending it already, as after scancel (COMPLETING)",
        ),
        (
            "JobState=CANCELLED Reason=None Requeue=1 BatchFlag=1",
            "since SLURM is ending it already, as after scancel (CANCELLED)",
        ),
        ("JobState=RUNNING Requeue=1 BatchFlag=0", "since it is interactive"),
        ("JobState=RUNNING Requeue=0 BatchFlag=1", "since it was submitted with --no-requeue"),
    ],
)
def test_what_was_cancelled_stays_so_and_what_cannot_be_requeued_says_why(slurm, about, why):
    requests = slurm(about)
    assert requeue(USR2) == f"SLURM job 12 is not requeued, {why}: run again to continue"
    assert requests() == []


@pytest.mark.parametrize(("restarts", "count"), [("1", None), ("3", "2")])
@pytest.mark.parametrize("tasks", ["16", "1"])
def test_a_job_that_slurm_requeues_by_itself_continues_by_itself(slurm, restarts, count, tasks):
    about = f"JobState=COMPLETING Reason=None Requeue=1 Restarts={restarts} BatchFlag=1"
    requests = slurm(about, SLURM_STEP_NUM_TASKS=tasks, **({"SLURM_RESTART_COUNT": count} if count else {}))
    assert requeue(TERM) == already_requeued() == "SLURM job 12 is requeued and continues by itself"
    assert requests() == []


@pytest.mark.parametrize("restarts", ["1", "2"])
def test_cancelled_after_a_requeue_it_is_not_taken_for_requeued(slurm, restarts):
    slurm(f"JobState=COMPLETING Reason=None Requeue=1 Restarts={restarts} BatchFlag=1", SLURM_RESTART_COUNT="2")
    assert already_requeued() is None
    assert "since SLURM is ending it already, as after scancel" in requeue(TERM)


def test_a_job_out_of_time_is_requeued_if_it_was_warned_by_usr2(slurm):
    requests = slurm("JobState=COMPLETING Reason=TimeLimit Requeue=1 BatchFlag=1")
    assert "since its time is over (sbatch --signal=USR2@" in requeue(TERM)
    assert requests() == []
    assert requeue(USR2 | TERM) == "SLURM job 12 is requeued and continues by itself"


def test_a_sigterm_to_the_whole_job_spares_scontrol(slurm, tmp_path):
    requests = slurm()
    scontrol = tmp_path / "scontrol"
    dying = "if sys.argv[1] == 'requeue': os.kill(os.getpid(), signal.SIGTERM)"
    scontrol.write_text(f"{scontrol.read_text()}\nimport os, signal\n{dying}\n")
    assert requeue(USR2) == "SLURM job 12 is requeued and continues by itself"
    assert requests() == ["requeue 12"]


def test_a_sigterm_in_a_job_of_one_task_may_be_a_persons(slurm, monkeypatch):
    requests = slurm(SLURM_STEP_NUM_TASKS="1")
    assert requeue(TERM) == "run again to continue (in a SLURM job of one task, only SIGUSR2 requeues)"
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # a batch script without srun
    assert "only SIGUSR2 requeues" in requeue(TERM)
    assert requests() == []
    assert requeue(USR2) == "SLURM job 12 is requeued and continues by itself"


def test_a_controller_that_does_not_answer_is_asked_again(slurm):
    requests = slurm(refusals=2)
    assert requeue(USR2) == "SLURM job 12 is requeued and continues by itself"
    assert len(requests()) == 3


def test_and_what_it_said_last_is_told(slurm):
    slurm(refusals=3)
    said = "Unable to contact slurm controller (connect failure)"
    assert requeue(USR2) == f"SLURM job 12 is not requeued: {said}: run again to continue"


def test_a_container_without_scontrol_says_so(slurm, tmp_path):
    slurm()
    (tmp_path / "scontrol").unlink()
    assert requeue(USR2) == "SLURM job 12 is not requeued, since there is no scontrol here: run again to continue"


def test_requeueing_and_signals_need_no_torch():
    code = "import sys, stpredict.jobs.requeue, stpredict.training.signals; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
