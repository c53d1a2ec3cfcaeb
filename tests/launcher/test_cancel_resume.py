"""Ending and going on with pipelines that run on this machine; ranks are fakes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UsageError
from launcher import cancel as cancelling
from launcher.cancel import as_text, cancel
from launcher.config import LocalCluster, SlurmCluster, SlurmOptions
from launcher.launch import launch
from launcher.local_pipeline import LocalExecutor
from launcher.logs import LogReader
from launcher.overview import Slurm, rows
from launcher.pipeline import load_pipeline
from launcher.record import JobRecord, PipelineRun, Record, Submitted
from launcher.resume import resumable, resume_job
from stpredict.run import Run

ROOT = Path(__file__).parents[2]
LAUNCH = """
import sys
from functools import partial
from pathlib import Path
from conftest import fake_command
from launcher.config import LocalCluster
from launcher.launch import launch
from launcher.local import running
from launcher.local_pipeline import LocalExecutor
from launcher.pipeline import load_pipeline
executor = LocalExecutor(LocalCluster(), partial(running, command=fake_command(sys.argv[2])))
sys.exit(launch(*load_pipeline(Path(sys.argv[1])), LocalCluster(), executor=executor))
"""


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(cancelling, "ASK_EVERY_S", 0.1)


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """The file of a pipeline first → second, in tmp_path/run."""
    job = {"kind": "evaluate", "run": "x", "generated": "/videos"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    jobs = {"second": {"config": "job.yaml", "needs": ["first"]}, "first": {"config": "job.yaml"}}
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"kind": "pipeline", "name": "p", "run": str(tmp_path / "run"), "jobs": jobs}))
    return path


def launch_with(pipeline: Path, fake_running, *ranks: str) -> int:
    executor = LocalExecutor(LocalCluster(), fake_running(*ranks))
    return launch(*load_pipeline(pipeline), LocalCluster(), executor=executor)


def states(path: Path) -> dict[str, str]:
    return {row.job: row.state for row in rows(path)}


def wait_until(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def going_on(pipeline, tmp_path):
    """That pipeline's run, launched by another process, whose first job trains until it is told to stop."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'launcher'}"}
    command = [sys.executable, "-c", LAUNCH, str(pipeline), "save"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            first = Run(tmp_path / "run" / "first")
            wait_until(lambda: (status := first.status()) is not None and status.step == 4)
            yield tmp_path / "run"
            assert process.wait(timeout=30) == 75
        finally:
            process.kill()


def test_cancel_ends_a_launcher_here_whose_job_saves(going_on):
    assert states(going_on) == {"first": "running", "second": "not started"}
    ended = cancel(going_on)
    assert as_text(ended, going_on) == ["first: stopped by SIGTERM", f"go on: stpredict resume {going_on}"]
    assert states(going_on) == {"first": "cancelled", "second": "cancelled"}
    assert PipelineRun(going_on).record().cancelled
    assert cancel(going_on) == []


def test_a_launcher_on_another_machine_is_named_and_left_alone(going_on):
    lock = going_on / ".lock"
    owner = lock.read_text()
    lock.write_text(f"process {owner.split()[1]} on far-away\n")
    with pytest.raises(UsageError, match=r"made by process \d+ on far-away: cancel it there"):
        cancel(going_on)
    assert states(going_on)["first"] == "running"
    lock.write_text(owner)
    ended = cancel(going_on / "first")  # one job of it, which is what the pipeline stops for
    assert as_text(ended, going_on / "first")[1:] == [
        "second: not started, for want of it",
        f"go on: stpredict resume {going_on}",
    ]
    assert states(going_on)["first"] == "preempted"


def test_what_resume_launches_is_what_was_launched_whatever_the_files_say_now(pipeline, fake_running, tmp_path):
    assert launch_with(pipeline, fake_running, "2") == 2
    before = load_pipeline(pipeline)
    (tmp_path / "job.yaml").write_text("kind: evaluate\nrun: x\ngenerated: /other\nseed: 9\n")
    found = resumable(tmp_path / "run")
    assert (found.pipeline, found.jobs) == before
    assert (found.cluster, found.cluster_name) == (LocalCluster(), "local")
    executor = LocalExecutor(found.cluster, fake_running("ok"))
    assert launch(found.pipeline, found.jobs, found.cluster, executor=executor) == 0
    assert states(tmp_path / "run") == {"first": "done", "second": "done"}
    assert "/videos" in Run(tmp_path / "run" / "second").config_path.read_text()


def test_resume_goes_to_where_it_was_launched_and_says_so(pipeline, fake_running, tmp_path, monkeypatch, capsys):
    data = yaml.safe_load(pipeline.read_text())
    pipeline.write_text(yaml.safe_dump({**data, "run": "run"}))
    monkeypatch.chdir(tmp_path)
    launch_with(pipeline, fake_running, "2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resumable(Path("..") / "run").jobs[0].run.path.resolve() == tmp_path / "run" / "first"
    assert Path.cwd() == tmp_path
    assert f"in {tmp_path}, where it was launched" in capsys.readouterr().err


def test_a_run_that_was_moved_or_has_no_record_is_not_resumed(pipeline, fake_running, tmp_path):
    launch_with(pipeline, fake_running, "2")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"moved was launched as .*/run, and .*; move it back"):
        resumable(moved)
    (moved / "launcher" / "record.json").unlink()
    with pytest.raises(UsageError, match="launch it again from its pipeline file"):
        resumable(moved)


def test_a_job_that_is_at_work_is_not_resumed_beside_itself(tmp_path, job):
    run = Run(tmp_path / "run")
    run.write_config(yaml.safe_dump(job().model_dump(mode="json")))
    run.update_status(kind="evaluate", state="running", host="elsewhere", pid=1)
    with pytest.raises(UsageError, match=r"run is running; first: stpredict cancel"):
        resume_job(run.path)
    with pytest.raises(UsageError, match="--rerun is for pipelines"):
        resume_job(run.path, ["--rerun"])


def test_the_code_of_a_later_launch_is_another_and_it_says_so(pipeline, fake_running, tmp_path, capsys):
    launch_with(pipeline, fake_running, "2")
    run = PipelineRun(tmp_path / "run")
    run.write_record(run.record().model_copy(update={"code": "0123456789ab"}))
    launch_with(pipeline, fake_running, "ok")
    assert "the code has changed since the last launch (0123456789ab → " in capsys.readouterr().out
    launch_with(pipeline, fake_running, "ok")
    assert "the code has changed" not in capsys.readouterr().out


def test_a_clusters_profile_read_back_from_a_record_asks_slurm_for_the_same(tmp_path):
    cluster = SlurmCluster(partition="gpu", time="10:00:00", kinds={"shard": SlurmOptions(partition="cpu")})
    record = Record(pipeline="p", cluster_name="c", cluster=cluster, code="x", launched="now", jobs={})
    run = PipelineRun(tmp_path)
    run.write_record(record)
    again = run.record().cluster
    assert again.options_of("shard") == cluster.options_of("shard")
    assert (again.options_of("shard").time, again.options_of("shard").partition) == ("10:00:00", "cpu")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """``squeue(lines)`` is a squeue that prints them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "none"))

    def make(*lines: str, sacct: str = "echo 'Slurm accounting storage is disabled' >&2; exit 1"):
        (folder / "lines").write_text("".join(f"{line}\n" for line in lines))
        (folder / "squeue").write_text(f"#!/bin/sh\ncat {folder / 'lines'}\n")
        (folder / "sacct").write_text(f"#!/bin/sh\n{sacct}\n")
        for tool in ("squeue", "sacct"):
            (folder / tool).chmod(0o755)

    return make


@pytest.fixture
def array(tmp_path) -> PipelineRun:
    """The run of a pipeline of one array of three parts, SLURM's 7_0 to 7_2, and their merge 8."""
    run = PipelineRun(tmp_path / "run")
    submitted = [Submitted(slurm_id=f"7_{part}", part=part) for part in range(3)]
    job = JobRecord(fingerprint="f", array=3, submitted=[*submitted, Submitted(slurm_id="8", merge=True)])
    cluster = SlurmCluster()
    jobs = {"shards": job}
    run.write_record(Record(pipeline="p", cluster_name="c", cluster=cluster, code="x", launched="2026", jobs=jobs))
    run.pipeline_path.write_text("name: p\njobs: {shards: {}}\n")
    return run


def part_status(array: PipelineRun, part: int, state: str, **fields):
    run = Run(array.path / "shards" / "parts" / f"{part}-of-3")
    run.path.mkdir(parents=True)
    run.write_config("")
    run.update_status(kind="shard", unit="sample", state=state, slurm_job_id=f"7_{part}", **fields)


def test_an_array_is_one_row_with_rows_for_the_parts_that_did_not_end_well(array, squeue):
    part_status(array, 0, "done", step=10, steps=10)
    part_status(array, 1, "failed", step=3, steps=10, error="no space left")
    part_status(array, 2, "running", step=5, steps=10, values={"samples_per_s": 2.0}, eta_s=9)
    squeue("7_2|RUNNING|None|n1|p.shards", "8|PENDING|Dependency||p.shards.merge")
    (row,) = rows(array.path)
    assert (row.state, row.parts_done, row.parts, row.status.step, row.status.steps) == ("running", 1, 3, 18, 30)
    assert (row.nodes, row.status.values) == ("n1", {"samples_per_s": 2.0})
    assert [(part.job, part.state, part.slurm_ids) for part in row.bad_parts] == [("shards.1", "failed", ["7_1"])]
    squeue("8|CANCELLED|DependencyNeverSatisfied||p.shards.merge")
    (row,) = rows(array.path)
    assert row.state == "failed"
    assert [(part.job, part.state) for part in row.bad_parts] == [("shards.1", "failed"), ("shards.2", "lost")]


def test_what_has_started_since_squeue_was_asked_is_no_longer_in_the_queue(array, squeue):
    squeue(*(f"7_{part}|PENDING|BeginTime||p.shards" for part in range(3)))
    slurm = Slurm()
    rows(array.path, slurm)
    part_status(array, 0, "running", started="2020-01-01T00:00:00+00:00")
    part_status(array, 1, "running", started="2999-01-01T00:00:00+00:00")
    (row,) = rows(array.path, slurm, ask=False)
    assert [part.state for part in row.all_parts] == ["requeued", "running", "queued"]


def test_an_array_takes_as_long_as_its_slowest_part(array, squeue):
    for part, eta_s in enumerate((500, 1000, 700)):
        part_status(array, part, "running", steps=10, eta_s=eta_s)
    squeue(*(f"7_{part}|RUNNING|None|n1|p.shards" for part in range(3)))
    assert 900 < rows(array.path)[0].eta_s <= 1000


def test_an_array_that_was_done_before_the_launch_is_up_to_date(array, squeue):
    whole = Run(array.path / "shards")
    for finished, state in (("2025", "up to date"), ("2027", "done")):
        whole.update_status(kind="shard", state="done", finished=f"{finished}-01-01T00:00:00+00:00")
        squeue()
        assert rows(array.path)[0].state == state


def test_a_merge_that_failed_says_why(array, squeue):
    for part in range(3):
        part_status(array, part, "done", finished="2026-01-01T00:00:00+00:00")
    Run(array.path / "shards").update_status(kind="shard", state="failed", slurm_job_id="8", error="no room")
    squeue()
    (row,) = rows(array.path)
    assert (row.state, row.reason, row.status.error, row.parts_done) == ("failed", "merge", "no room", 3)


def test_how_jobs_ended_that_squeue_has_forgotten_is_asked_of_the_accounts_once(array, squeue, tmp_path):
    for part in range(3):
        part_status(array, part, "running")
    asked = tmp_path / "asked"
    answer = "printf '7_0|TIMEOUT\\n7_1|NODE_FAIL\\n7_2|CANCELLED by 5\\n'"
    squeue(sacct=f"echo x >> {asked}; {answer}")
    slurm = Slurm()
    (row,) = rows(array.path, slurm)
    reasons = [(part.state, part.reason) for part in row.all_parts]
    assert reasons[:2] == [("lost", "ran into its time limit"), ("lost", "its node failed")]
    assert reasons[2] == ("cancelled", "ended before it could save")
    assert asked.read_text() == "x\n"
    (later,) = rows(array.path, slurm, ask=False)
    assert [(part.state, part.reason) for part in later.all_parts] == reasons
    assert asked.read_text() == "x\n"
    squeue(sacct="echo 'sacct: error: Connection refused' >&2; exit 1")
    again = Slurm()
    assert rows(array.path, again)[0].state == "lost"
    assert again.note == "sacct: sacct: error: Connection refused"


def test_what_another_slurm_calls_by_the_same_number_is_not_ours(array, squeue):
    squeue("7_0|RUNNING|None|n1|p.shards", "7_1|RUNNING|None|n1|dissertation", "8|RUNNING|None||dissertation")
    (row,) = rows(array.path)
    assert [part.state for part in row.all_parts] == ["starting", "lost", "lost"]
    assert cancelling._alive(array.record(), [row]) == {"7_0"}


def test_what_an_earlier_launch_submitted_is_no_matter_where_a_later_one_runs_here(array, squeue):
    part_status(array, 0, "failed", error="no space")
    record = array.record()
    array.write_record(record.model_copy(update={"cluster": LocalCluster()}))
    squeue("exit 1")
    slurm = Slurm()
    (row,) = rows(array.path, slurm)
    assert (row.state, row.slurm_ids, slurm.note) == ("failed", [], None)
    assert [part.state for part in row.all_parts] == ["failed", "not started", "not started"]


def test_a_job_that_slurm_did_for_a_pipeline_is_not_resumed_here_but_with_its_pipeline(tmp_path, job, monkeypatch):
    pipeline, cluster = PipelineRun(tmp_path / "my runs"), SlurmCluster(partition="all")
    jobs = {"train": JobRecord(fingerprint="x")}
    record = Record(pipeline="p", cluster_name="big", cluster=cluster, code="c", launched="2026-01-01", jobs=jobs)
    pipeline.write_record(record)
    run = Run(pipeline.path / "train")
    run.write_config(yaml.safe_dump(job().model_dump(mode="json")))
    run.update_status(kind="evaluate", state="preempted")
    with pytest.raises(UsageError, match=r"launched with --cluster big; .*: stpredict resume '.*/my runs'"):
        resume_job(run.path)
    monkeypatch.chdir(pipeline.path)
    with pytest.raises(UsageError, match=r"launched with --cluster big"):
        resume_job(Path("train"))


def test_of_an_array_the_log_is_that_of_a_part_that_failed_and_of_this_launch(array, squeue):
    part_status(array, 0, "failed", started="2020-01-01T00:00:00+00:00")
    part_status(array, 1, "done", started="2020-01-02T00:00:00+00:00", finished="2020-01-03T00:00:00+00:00")
    squeue()
    reader = LogReader(array.path, "shards")
    assert (reader.name, reader.row.state) == ("shards.0", "failed")
    log = reader.run.log_path(0)
    log.parent.mkdir()
    log.write_text("of this launch")
    of_slurm = array.slurm_folder("shards") / "7_0_0_log.err"
    of_slurm.parent.mkdir(parents=True)
    of_slurm.write_text("no python")
    array.write_record(array.record().model_copy(update={"launched": "2020-01-01T00:00:00+00:00"}))
    assert reader.files() == [log]
    os.utime(log, (0, 0))
    assert reader.files() == [of_slurm]
