"""Jobs that a real SLURM warns, cancels and starts again, over two nodes."""

from pathlib import Path

import pytest

from stpredict.run import Run
from tests.processes import succeeding

pytestmark = pytest.mark.slurm
STEPS = 40


@pytest.fixture(scope="module")
def shards(slurm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    settings = [f"run={folder}", "source.videos=24", "source.validation_videos=6"]
    slurm.run("stpredict", "shard", "configs/data/moving_digits.yaml", *settings)
    return folder


@pytest.fixture(scope="module")
def train(slurm, shards):
    """``train(run)`` submits the demo's tokenizer, smallest, one rank on each node; returns the job's id. It saves
    nothing before its end but when it is asked to stop."""

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


def in_the_middle(run: Run) -> bool:
    status = run.status()
    return status is not None and status.step >= 5


def losses(run: Run) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in run.metrics() if row["split"] == "train"]


def weights(run: Run) -> bytes:
    return (run.export / "model.safetensors").read_bytes()


def test_warned_by_usr2_a_job_saves_and_requeues_itself_and_ends_as_if_never_interrupted(
    slurm, train, uninterrupted, tmp_path
):
    run = Run(tmp_path / "run")
    job = train(run)
    slurm.wait_for(lambda: in_the_middle(run))
    slurm.run("scancel", "--signal=USR2", job)
    about = slurm.wait(job, "PENDING")
    assert (about["Restarts"], about["Reason"]) == ("1", "BeginTime")
    status = run.status()
    assert status.state == "preempted"
    then = f"SLURM job {job} is requeued and continues by itself"
    assert status.error == f"stopped at step {status.step} of {STEPS}; {then}"
    assert 5 <= status.step < STEPS
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # instead of two minutes later
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    status = run.status()
    assert (status.state, status.slurm_job_id, status.error) == ("done", job, None)
    assert f"continuing from {run.checkpoints}" in Path(f"{run.path}.log").read_text()
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(uninterrupted)
    assert weights(run) == weights(uninterrupted)


def test_cancelled_a_job_saves_and_stays_cancelled(slurm, train, tmp_path):
    run = Run(tmp_path / "run")
    job = train(run)
    slurm.wait_for(lambda: in_the_middle(run))
    slurm.run("scancel", job)
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "0"
    status = run.status()
    assert status.state == "preempted"
    assert f"SLURM job {job} is not requeued, since SLURM is ending it already" in status.error
    assert (run.checkpoints / f"step_{status.step:08d}" / "COMPLETE").exists()


def test_of_an_array_only_the_warned_task_requeues_itself_and_the_set_is_whole(slurm, tmp_path):
    run = tmp_path / "shards"
    settings = [f"run={run}", "parts=2", "source.videos=300", "source.validation_videos=6"]
    script = ["slurm/shard_array.sbatch", "configs/data/moving_digits.yaml", *settings]
    array = slurm.submit("--array=0-1", "--cpus-per-task=1", "--mem=0", f"--output={tmp_path}/%a.log", *script)
    part = Run(run / "parts" / "1-of-2")
    slurm.wait_for(lambda: (status := part.status()) is not None and status.step > 0)
    slurm.run("scancel", "--batch", "--signal=USR2", f"{array}_1")
    slurm.wait(f"{array}_1", "PENDING")
    assert part.status().state == "preempted"
    assert slurm.about(f"{array}_0")["Restarts"] == "0"
    slurm.run("scontrol", "update", f"JobId={array}_1", "StartTime=now")
    for task, restarts in ((0, "0"), (1, "1")):
        assert slurm.wait(f"{array}_{task}", "COMPLETED")["Restarts"] == restarts
    merged = succeeding(["stpredict", "merge", str(run)], env=slurm.environment).stdout
    assert "train: 300 samples" in merged
