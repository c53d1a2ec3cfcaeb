"""status, logs, cancel and resume of pipelines on a real SLURM."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.record import PipelineRun
from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints, step_of
from tests.data_pipeline.numbered_videos import make_videos
from tests.processes import bounded

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
STEPS = 40


def status_of(slurm, run: Path) -> dict[str, dict[str, Any]]:
    return {row["job"]: row for row in json.loads(slurm.run("stpredict", "status", run, "--json"))}


def states_of(slurm, run: Path) -> dict[str, str]:
    return {name: row["state"] for name, row in status_of(slurm, run).items()}


class Broken:
    """shards (an array) → more, whose videos are not there → page → last. No job of it imports torch."""

    def __init__(self, folder: Path):
        self.run, self.videos, self.path = folder / "run", folder / "videos", folder / "pipelines" / "broken.yaml"
        page = {
            "config": str(CONFIGS / "priors" / "report.yaml"),
            "set": {"title": "t", "runs": {"s": "${run:shards}"}},
        }
        digits, own = str(CONFIGS / "data" / "moving_digits.yaml"), str(CONFIGS / "data" / "folder.yaml")
        few = {"source": {"videos": 24, "validation_videos": 6}}
        jobs = {
            "shards": {"config": digits, "array": 2, "set": few},
            "more": {"config": own, "needs": ["shards"], "set": {"source": {"path": str(self.videos)}}},
            "page": {**page, "needs": ["shards", "more"]},
            "last": {**page, "needs": ["shards", "page"]},
        }
        self.path.parent.mkdir(parents=True)
        self.path.write_text(yaml.safe_dump({"kind": "pipeline", "name": "broken", "run": str(self.run), "jobs": jobs}))


@pytest.fixture(scope="module")
def broken(slurm, pipelines, tmp_path_factory) -> Broken:
    """Launched, and ended."""
    pipeline = Broken(tmp_path_factory.mktemp("broken"))
    slurm.run("stpredict", "launch", pipeline.path, "--cluster", "slurm_single_machine")
    seen = []

    def waits():
        seen.append(status_of(slurm, pipeline.run))
        return (seen[-1]["last"]["state"], seen[-1]["last"]["reason"]) == ("queued", "Dependency")

    slurm.wait_for(waits)
    pipeline.queued = seen[-1]
    pipelines.wait(pipeline.run)
    return pipeline


def test_in_the_queue_a_job_says_what_it_waits_for_and_what_slurm_calls_it(broken):
    more = broken.queued["more"]
    assert (more["state"], more["reason"], more["live"]) == ("queued", "Dependency", True)
    assert more["slurm_ids"] == [PipelineRun(broken.run).record().jobs["more"].submitted[0].slurm_id]
    shards = broken.queued["shards"]
    assert shards["state"] in ("queued", "starting", "running")
    assert (shards["parts_done"], shards["parts"], len(shards["slurm_ids"])) == (0, 2, 3)


def test_a_job_that_failed_and_those_that_needed_it_say_so(slurm, broken):
    found = status_of(slurm, broken.run)
    assert {name: row["state"] for name, row in found.items()} == {
        "shards": "done",
        "more": "failed",
        "page": "cancelled",
        "last": "cancelled",
    }
    assert "no such folder" in found["more"]["status"]["error"]
    assert found["page"]["reason"] == "needs more, which failed"
    assert found["last"]["reason"] == "needs page, which needs more, which failed"
    assert not any(row["live"] for row in found.values())
    text = slurm.run("stpredict", "status", broken.run, "--watch")  # all have ended: it does not wait
    assert "page: needs more, which failed" in text


def test_without_an_answer_of_slurm_a_note_and_what_the_files_say(slurm, broken):
    conf, dead = Path(slurm.environment["SLURM_CONF"]).read_text(), broken.run.parent / "dead.conf"
    dead.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=9", conf))  # nobody listens there
    nowhere = slurm.environment | {"SLURM_CONF": str(dead)}
    with ThreadPoolExecutor() as both:  # squeue gives up after 9 s
        ask = partial(bounded, env=nowhere, cwd=ROOT)
        answer, refusal = both.map(ask, [["stpredict", command, str(broken.run)] for command in ("status", "cancel")])
    assert answer.returncode == 0
    assert answer.stderr.startswith("note: squeue: ")
    assert len(answer.stderr.splitlines()) == 1
    assert "no such folder" in answer.stdout
    assert (refusal.returncode, "nothing is cancelled" in refusal.stderr) == (1, True)


def test_logs_of_a_failed_job_of_parts_and_of_slurm(slurm, broken):
    assert "no such folder" in slurm.run("stpredict", "logs", broken.run, "more")
    slurms = slurm.run("stpredict", "logs", broken.run, "more", "--slurm")
    assert "=== start 1 of job" in slurms
    assert "Exited with exit code 2" in slurms
    never = bounded(["stpredict", "logs", str(broken.run), "page"], env=slurm.environment, cwd=ROOT)
    assert never.returncode == 2
    assert "cancelled (needs more, which failed)" in never.stderr
    silent = bounded(["stpredict", "logs", str(broken.run), "shards", "--part", "1"], env=slurm.environment, cwd=ROOT)
    assert "shards.1: done, without a log of its own; SLURM's:" in silent.stderr
    assert "=== start 1 of job" in silent.stdout


def test_one_job_is_cancelled_before_it_began_and_what_needs_it_with_it(slurm, tmp_path):
    waiting = Broken(tmp_path / "my runs")
    profile = tmp_path / "later.yaml"
    profile.write_text("kind: slurm\npartition: all\noptions: {begin: now+1hour}\n")
    slurm.run("stpredict", "launch", waiting.path, "--cluster", profile)
    told = slurm.run("stpredict", "cancel", waiting.run / "page").splitlines()
    assert told[0].startswith("page: cancelled")
    assert told[1:] == ["last: not started, for want of it", f"go on: stpredict resume '{waiting.run}'"]
    assert PipelineRun(waiting.run).record().cancelled is None
    slurm.wait_for(lambda: not status_of(slurm, waiting.run)["last"]["live"])
    expected = {"shards": "queued", "more": "queued", "page": "cancelled", "last": "cancelled"}
    assert states_of(slurm, waiting.run) == expected
    refused = bounded(["stpredict", "status", str(waiting.run / "page")], env=slurm.environment, cwd=ROOT)
    assert f"page has not begun; of its pipeline: stpredict status '{waiting.run}'" in refused.stderr
    slurm.run("stpredict", "cancel", waiting.run)


def test_there_is_nothing_to_cancel_once_all_has_ended(slurm, broken):
    assert "nothing to cancel" in slurm.run("stpredict", "cancel", broken.run)
    assert slurm.run("stpredict", "cancel", broken.run, "--json").strip() == "[]"
    assert PipelineRun(broken.run).record().cancelled is None


def test_resume_does_what_is_missing_from_the_run_alone(slurm, pipelines, broken):
    make_videos(broken.videos, 8)
    broken.path.unlink()
    told = json.loads(slurm.run("stpredict", "resume", broken.run, "--json"))
    assert [job["action"] for job in told["jobs"].values()] == ["skip", "run", "run", "run"]
    assert [len(job["submitted"]) for job in told["jobs"].values()] == [0, 1, 1, 1]
    slurm.run("stpredict", "status", broken.run, "--watch")  # until all have ended
    expected = {"shards": "up to date", "more": "done", "page": "done", "last": "done"}
    assert states_of(slurm, broken.run) == expected


@pytest.fixture(scope="module")
def cancelled(slurm, pipelines, tmp_path_factory) -> dict[str, Any]:
    """A pipeline whose training job is at work, followed by `logs -f` from the queue on, and then cancelled."""
    run = tmp_path_factory.mktemp("cancelled") / "run"
    changes = [f"jobs.tokenizer.set.training.steps={STEPS}"]
    pipelines.launch(run, *changes)
    follow = ["stpredict", "logs", str(run), "tokenizer", "-f"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(follow, env=slurm.environment, cwd=ROOT, **pipes) as follower:
        tokenizer = Run(run / "tokenizer")
        try:
            slurm.wait_for(lambda: (status := tokenizer.status()) is not None and status.step >= 3)
            running = status_of(slurm, run)
            text = slurm.run("stpredict", "cancel", run)
            out, errors = follower.communicate(timeout=60)
        finally:
            follower.kill()
    return {"run": run, "running": running, "cancel": text, "log": out, "followed": errors}


def test_a_running_job_says_where_it_is_and_how_far(cancelled):
    tokenizer = cancelled["running"]["tokenizer"]
    assert (tokenizer["state"], tokenizer["nodes"], tokenizer["live"]) == ("running", "one-a,one-b", True)
    assert tokenizer["status"]["step"] >= 3
    assert tokenizer["heartbeat_age_s"] < 30
    assert cancelled["running"]["shards"]["state"] == "done"
    latents = cancelled["running"]["latents"]
    assert (latents["state"], latents["parts"], latents["parts_done"]) == ("queued", 2, 0)


def test_logs_f_waits_in_the_queue_and_goes_on_until_the_job_ends(cancelled):
    assert "tokenizer: queued" in cancelled["followed"]
    assert cancelled["followed"].splitlines()[-1] == "tokenizer: cancelled"
    assert f"step 1/{STEPS} " in cancelled["log"]
    assert "saved" in cancelled["log"]


def test_cancel_takes_the_whole_pipeline_and_the_training_job_saves(slurm, cancelled):
    run = cancelled["run"]
    ids = {name.partition("_")[0] for name in PipelineRun(run).record().slurm_ids()}
    assert not ids & set(slurm.run("squeue", "--noheader", "--format=%F").split())
    found = status_of(slurm, run)
    assert {name: row["state"] for name, row in found.items()} == {
        "shards": "done",
        "tokenizer": "cancelled",
        "latents": "cancelled",
        "report": "cancelled",
    }
    assert found["report"]["reason"] == "before it started"
    step = found["tokenizer"]["status"]["step"]
    saved = complete_checkpoints(run / "tokenizer" / "checkpoints")
    assert [step_of(folder) for folder in saved] == [step]
    first, *_, last = cancelled["cancel"].splitlines()
    assert first == f"tokenizer: stopped at step {step} of {STEPS}; its newest checkpoint is of step {step}"
    assert last == f"go on: stpredict resume {run}"


def test_a_cancelled_pipeline_resumes_to_its_end(slurm, cancelled):
    run = cancelled["run"]
    step = Run(run / "tokenizer").status().step
    told = json.loads(slurm.run("stpredict", "resume", run, "--json"))
    actions = {name: job["action"] for name, job in told["jobs"].items()}
    assert actions == {"shards": "skip", "tokenizer": "continue", "latents": "run", "report": "run"}
    assert states_of(slurm, run)["tokenizer"] in ("queued", "starting", "running")
    watched = bounded(["stpredict", "status", str(run), "-w"], timeout_s=240, env=slurm.environment, cwd=ROOT)
    assert watched.returncode == 0
    expected = {"shards": "up to date", "tokenizer": "done", "latents": "done", "report": "done"}
    assert states_of(slurm, run) == expected
    assert Run(run / "tokenizer").status().continued_from == step
