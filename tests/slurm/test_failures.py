"""Jobs of pipelines that fail on a real SLURM: tried again on another node, given up, mended. No job imports torch."""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from launcher.record import PipelineRun
from stpredict.run import Run

pytestmark = pytest.mark.slurm
CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = {"kind": "moving_digits", "videos": 150, "validation_videos": 6}
CLUSTER = {"kind": "slurm", "partition": "all", "retries": 1}


class Launched(NamedTuple):
    """A pipeline ``shards`` → ``report``, and SLURM's names of its jobs."""

    file: Path
    run: Path
    shards: str
    report: str


@pytest.fixture
def launch(slurm, tmp_path):
    """``launch(source)`` has SLURM shard that and report on it; ``source`` goes into the shard job's config."""
    file, cluster = tmp_path / "pipeline.yaml", tmp_path / "cluster.yaml"

    def start(source: dict, array: int | None = None, **profile: str) -> Launched:
        config = tmp_path / "shard.yaml"
        config.write_text(yaml.safe_dump({"kind": "shard", "source": source}))
        jobs = {
            "shards": {"config": str(config), "array": array},
            "report": {
                "config": str(CONFIGS / "priors" / "report.yaml"),
                "needs": ["shards"],
                "set": {"title": "x", "runs": {"shards": "${run:shards}"}},
            },
        }
        file.write_text(
            yaml.safe_dump({"kind": "pipeline", "name": "failing", "run": str(tmp_path / "run"), "jobs": jobs})
        )
        cluster.write_text(yaml.safe_dump(CLUSTER | profile))
        return again()

    def again() -> Launched:
        slurm.run("stpredict", "launch", file, "--cluster", cluster)
        jobs = PipelineRun(tmp_path / "run").record().jobs
        ids = [job.submitted[0].slurm_id.partition("_")[0] for job in jobs.values()]
        return Launched(file, tmp_path / "run", *ids)

    start.again = again
    return start


def states(slurm, launched: Launched) -> dict[str, tuple[str, str | None]]:
    """What `stpredict status` says: job → state, reason."""
    rows = json.loads(slurm.run("stpredict", "status", launched.run, "--json"))
    rows = rows["jobs"] if isinstance(rows, dict) else rows
    return {row["job"]: (row["state"], row["reason"]) for row in rows}


def hashes(shards: Path) -> dict[str, str]:
    files = [file for split in ("train", "val") for file in (shards / split).iterdir()]
    return {str(file.relative_to(shards)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_task_of_an_array_that_is_killed_runs_again_on_the_other_node_and_it_alone(slurm, launch, tmp_path):
    launched = launch(DIGITS, array=2)
    killed = f"{launched.shards}_1"
    part = Run(launched.run / "shards" / "parts" / "1-of-2")
    slurm.wait_for(lambda: (status := part.status()) is not None and status.step > 0)
    ((pid, node),) = slurm.ranks(killed).values()
    os.kill(pid, signal.SIGKILL)
    slurm.requeued(killed)
    slurm.start_now(killed)
    config = ["configs/data/moving_digits.yaml", *(f"source.{key}={value}" for key, value in DIGITS.items())]
    slurm.run("stpredict", "shard", *config, f"run={tmp_path / 'alone'}", "workers=1")
    slurm.wait(launched.report, "COMPLETED")
    about = slurm.about(killed)
    assert (about["Restarts"], about["ExcNodeList"]) == ("1", node)
    assert about["NodeList"] != node
    assert slurm.about(f"{launched.shards}_0")["Restarts"] == "0"
    assert (part.status().state, part.status().error, part.status().note) == ("done", None, None)
    assert hashes(launched.run / "shards") == hashes(tmp_path / "alone")


def test_a_job_that_always_fails_is_given_up_with_its_dependents_and_finishes_once_its_cause_is_mended(
    slurm, launch, tmp_path
):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        (videos / f"{number}.mp4").write_text("no video")
    launched = launch({"kind": "folder", "path": str(videos)})
    run = Run(launched.run / "shards")
    slurm.requeued(launched.shards)
    slurm.wait_for(lambda: slurm.about(launched.shards)["ExcNodeList"] != "(null)")
    first = slurm.about(launched.shards)["ExcNodeList"]
    why = f"{run.path}/train: none of the 3 samples could be read"
    assert run.status().state == "pending"
    assert run.status().note.startswith(f"failed: {why}")
    assert run.status().note.endswith(f"; start 2 of 2 follows, without {first}")
    assert states(slurm, launched)["report"][0] == "queued"
    slurm.start_now(launched.shards)
    about = slurm.wait(launched.shards, "FAILED")
    assert (about["Restarts"], about["NodeList"]) == ("1", "one-a" if first == "one-b" else "one-b")
    slurm.wait(launched.report, "CANCELLED")
    status = run.status()
    assert (status.state, status.note) == ("failed", "failed 2 times; run again to continue")
    assert status.error.startswith(why)
    assert status.error.endswith(f"(rank 0 on {about['NodeList']}; log: {run.log_path(0)})")
    assert states(slurm, launched) == {
        "shards": ("failed", None),
        "report": ("cancelled", "needs shards, which failed"),
    }
    for number, video in enumerate(sorted(_some_videos(slurm, tmp_path / "others"))[:4]):
        shutil.copyfile(video, videos / f"{number}.mp4")
    launched = launch.again()
    slurm.wait(launched.report, "COMPLETED")
    status = run.status()
    assert (status.state, status.error, status.note) == ("done", None, None)


def _some_videos(slurm, folder: Path) -> list[Path]:
    settings = [f"run={folder}", "source.videos=4", "source.validation_videos=1"]
    slurm.run("stpredict", "shard", "configs/data/moving_digits.yaml", *settings)
    for tar in (folder / "train").glob("*.tar"):
        slurm.run("tar", "--extract", "--directory", folder, "--file", tar)
    return list(folder.glob("*.mp4"))


def test_bad_usage_is_not_tried_again(slurm, launch, tmp_path):
    launched = launch({"kind": "folder", "path": str(tmp_path / "nowhere")})
    assert slurm.wait(launched.shards, "FAILED")["Restarts"] == "0"
    slurm.wait(launched.report, "CANCELLED")
    status = Run(launched.run / "shards").status()
    assert status.state == "failed"
    assert status.error.startswith(
        f"{tmp_path}/nowhere: no such folder; source.path must name a folder of videos (rank 0"
    )
    assert status.note == "not started again, since it would fail the same way"


def test_ranks_without_scontrol_as_in_a_container_are_requeued_by_the_batch_script(slurm, launch):
    launched = launch(DIGITS, python=f"env PATH=/nowhere {sys.executable}")
    run = Run(launched.run / "shards")
    slurm.wait_for(lambda: (status := run.status()) is not None and status.step > 0)
    slurm.run("scancel", "--signal=USR2", launched.shards)
    slurm.requeued(launched.shards)
    then = f"SLURM job {launched.shards} is requeued and continues by itself"
    assert (run.status().state, run.status().error) == ("preempted", f"stopped; {then}")
    assert slurm.about(launched.shards)["ExcNodeList"] == "(null)"
    slurm.start_now(launched.shards)
    slurm.wait(launched.report, "COMPLETED")
    assert (run.status().state, run.status().error) == ("done", None)


def test_a_job_that_never_reaches_python_has_failed_and_its_log_says_why(slurm, launch):
    launched = launch(DIGITS, python="/nowhere/python")
    assert slurm.wait(launched.shards, "FAILED")["Restarts"] == "0"
    slurm.wait(launched.report, "CANCELLED")
    state, reason = states(slurm, launched)["shards"]
    assert state == "failed"
    assert "/nowhere/python: No such file or directory" in reason
