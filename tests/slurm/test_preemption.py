"""Jobs that a real SLURM warns, requeues, cancels, or loses the node of: they end as if nobody had interrupted them.

All trainings are the demo's tokenizer, smallest, and save nothing before their end but when they are asked to stop.
"""

import os
import signal
from pathlib import Path

import pytest
import yaml

from launcher.record import PipelineRun
from stpredict.run import Run
from tests.processes import succeeding

pytestmark = pytest.mark.slurm
CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 40
TRAINING = {"steps": STEPS, "batch_size": 4, "log_every": 1, "precision": "fp32", "checkpoint": {"every": 1000}}
CLUSTER = {"kind": "slurm", "partition": "all", "ranks_per_node": 2, "environment": {"GLOO_SOCKET_IFNAME": "lo"}}


@pytest.fixture(scope="module")
def shards(slurm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    settings = [f"run={folder}", "source.videos=24", "source.validation_videos=6"]
    slurm.run("stpredict", "shard", "configs/data/moving_digits.yaml", *settings)
    return folder


@pytest.fixture(scope="module")
def train(slurm, shards):
    """``train(run)`` submits a training by hand, one rank on each node; returns the job's id."""

    def submit(run: Run) -> str:
        size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
        settings = [f"run={run.path}", f"data.shards={shards}", f"training.steps={STEPS}", "training.batch_size=4"]
        settings += ["training.log_every=1", "training.checkpoint.every=1000", "training.precision=fp32"]
        script = ["slurm/train.sbatch", "configs/tokenizers/demo.yaml"]
        return slurm.submit(*size, f"--output={run.path}.log", *script, *settings)

    return submit


@pytest.fixture(scope="module")
def uninterrupted(slurm, train, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted") / "run")
    slurm.wait(train(run), "COMPLETED")
    return run


@pytest.fixture(scope="module")
def pipeline(slurm, shards, uninterrupted, tmp_path_factory) -> PipelineRun:
    """Three trainings and a report that needs them, launched. In the middle of ``requeued`` an operator has requeued
    it; ``limited``, which is warned a minute before its time limit, is held there and given little more than that,
    until SLURM, which wakes it, does so: its steps are too quick to last. ``lost``, on one node, waits until both, over
    two nodes, have ended."""
    folder = tmp_path_factory.mktemp("pipeline")

    def training(resources: dict, needs: list[str]) -> dict:
        settings = {"resources": {"processes": 2, **resources}, "data": {"shards": str(shards)}, "training": TRAINING}
        return {"config": str(CONFIGS / "tokenizers" / "demo.yaml"), "needs": needs, "set": settings}

    jobs = {
        "requeued": training({"nodes": 2}, []),
        "limited": training({"nodes": 2}, []),
        "lost": training({"nodes": 1}, ["requeued", "limited"]),
    }
    runs = {name: f"${{run:{name}}}" for name in jobs}
    report = {"config": str(CONFIGS / "priors" / "report.yaml"), "set": {"title": "x", "runs": runs}}
    jobs["report"] = {**report, "needs": list(jobs)}
    file, cluster = folder / "pipeline.yaml", folder / "cluster.yaml"
    file.write_text(yaml.safe_dump({"kind": "pipeline", "name": "stopped", "run": str(folder / "run"), "jobs": jobs}))
    cluster.write_text(yaml.safe_dump({**CLUSTER, "signal_delay_s": 60}))
    slurm.run("stpredict", "launch", file, "--cluster", cluster)
    pipeline = PipelineRun(folder / "run")

    def hold(job: str) -> None:
        for pid, _ in slurm.ranks(job).values():
            os.kill(pid, signal.SIGSTOP)
        hours, minutes, _ = map(int, slurm.about(job)["RunTime"].split(":"))
        slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + minutes + 2}")

    meddling = {"requeued": lambda job: slurm.run("scontrol", "requeue", job), "limited": hold}

    def meddled() -> bool:
        for name in [name for name in meddling if in_the_middle(Run(pipeline.path / name))]:
            meddling.pop(name)(pipeline.record().jobs[name].submitted[0].slurm_id)
        return not meddling

    slurm.wait_for(meddled, 240)
    return pipeline


@pytest.fixture
def job(pipeline):
    """``job(name)``: the run directory of a job of the pipeline, and what SLURM calls it."""

    def find(name: str) -> tuple[Run, str]:
        return Run(pipeline.path / name), pipeline.record().jobs[name].submitted[0].slurm_id

    return find


def in_the_middle(run: Run) -> bool:
    status = run.status()
    return status is not None and status.step >= 5


def losses(run: Run) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in run.metrics() if row["split"] == "train"]


def weights(run: Run) -> bytes:
    return (run.export / "model.safetensors").read_bytes()


def assert_saved(run: Run, job: str) -> None:
    """That the run was stopped in the middle, and status.json says that SLURM starts it again."""
    status = run.status()
    then = f"SLURM job {job} is requeued and continues by itself"
    assert (status.state, status.error) == ("preempted", f"stopped at step {status.step} of {STEPS}; {then}")
    assert 5 <= status.step < STEPS
    assert (run.checkpoints / f"step_{status.step:08d}" / "COMPLETE").exists()


def assert_as_if_never(run: Run, uninterrupted: Run) -> None:
    status = run.status()
    assert (status.state, status.error, status.note) == ("done", None, None)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(uninterrupted)
    assert weights(run) == weights(uninterrupted)


def test_warned_by_usr2_a_job_by_hand_saves_and_requeues_itself(slurm, train, uninterrupted, tmp_path):
    run = Run(tmp_path / "run")
    id = train(run)
    slurm.wait_for(lambda: in_the_middle(run))
    slurm.run("scancel", "--signal=USR2", id)
    assert slurm.requeued(id)["Reason"] == "BeginTime"
    assert_saved(run, id)
    slurm.start_now(id)
    assert slurm.wait(id, "COMPLETED")["Restarts"] == "1"
    assert f"continuing from {run.checkpoints}" in Path(f"{run.path}.log").read_text()
    assert_as_if_never(run, uninterrupted)


def test_cancelled_a_job_saves_and_stays_cancelled(slurm, train, tmp_path):
    run = Run(tmp_path / "run")
    id = train(run)
    slurm.wait_for(lambda: in_the_middle(run))
    slurm.run("scancel", id)
    assert slurm.wait(id, "CANCELLED")["Restarts"] == "0"
    status = run.status()
    assert status.state == "preempted"
    assert f"SLURM job {id} is not requeued, since SLURM is ending it already" in status.error
    assert (run.checkpoints / f"step_{status.step:08d}" / "COMPLETE").exists()


def test_out_of_time_it_saves_requeues_itself_and_continues(slurm, job, uninterrupted):
    run, id = job("limited")
    slurm.requeued(id)
    assert_saved(run, id)
    slurm.start_now(id, "TimeLimit=10")  # or it might be warned again, on a busy machine before its first step
    assert slurm.wait(id, "COMPLETED", 240)["Restarts"] == "1"
    assert_as_if_never(run, uninterrupted)


def test_a_job_of_a_pipeline_that_an_operator_requeues_saves_and_continues(slurm, job, uninterrupted):
    run, id = job("requeued")
    slurm.requeued(id)
    assert_saved(run, id)
    slurm.start_now(id)
    assert slurm.wait(id, "COMPLETED", 240)["Restarts"] == "1"
    assert_as_if_never(run, uninterrupted)


def test_a_job_whose_node_goes_down_starts_again_on_the_other_and_then_its_dependents_run(slurm, job, uninterrupted):
    run, id = job("lost")
    slurm.wait_for(lambda: in_the_middle(run), 240)
    node = slurm.about(id)["NodeList"]
    for state in ("DRAIN", "DOWN"):  # drained, it does not come back by itself
        slurm.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")
    try:
        slurm.requeued(id)
        slurm.start_now(id)
        about = slurm.wait(id, "COMPLETED", 240)
    finally:
        slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert (about["Restarts"], about["NodeList"]) == ("1", "one-a" if node == "one-b" else "one-b")
    assert run.status().state == "done"
    assert weights(run) == weights(uninterrupted)
    report, id = job("report")
    slurm.wait(id, "COMPLETED")
    assert (report.path / "report.html").exists()


def test_of_an_array_only_the_warned_task_requeues_itself_and_the_set_is_whole(slurm, tmp_path):
    run = tmp_path / "shards"
    settings = [f"run={run}", "parts=2", "source.videos=300", "source.validation_videos=6"]
    script = ["slurm/shard_array.sbatch", "configs/data/moving_digits.yaml", *settings]
    array = slurm.submit("--array=0-1", "--cpus-per-task=1", "--mem=0", f"--output={tmp_path}/%a.log", *script)
    part = Run(run / "parts" / "1-of-2")
    slurm.wait_for(lambda: (status := part.status()) is not None and status.step > 0)
    slurm.run("scancel", "--batch", "--signal=USR2", f"{array}_1")
    slurm.requeued(f"{array}_1")
    assert part.status().state == "preempted"
    assert slurm.about(f"{array}_0")["Restarts"] == "0"
    slurm.start_now(f"{array}_1")
    for task, restarts in ((0, "0"), (1, "1")):
        assert slurm.wait(f"{array}_{task}", "COMPLETED")["Restarts"] == restarts
    merged = succeeding(["stpredict", "merge", str(run)], env=slurm.environment).stdout
    assert "train: 300 samples" in merged
