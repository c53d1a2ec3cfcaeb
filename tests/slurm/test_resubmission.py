"""A launch does what is missing, depends upon what is queued, and runs the code of its time."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from launcher.record import PipelineRun
from stpredict.run import Run
from tests.slurm.small_pipeline import Small

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]


class Source:
    """A copy of the packages in a git repository of its own, from which jobs are launched."""

    def __init__(self, folder: Path):
        self.folder, self.module = folder, folder / "stpredict" / "jobs" / "report.py"
        for package in ("data_pipeline", "stpredict", "launcher"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--message=x")

    def git(self, *words: str) -> str:
        return subprocess.run(["git", "-C", self.folder, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wake(slurm):
    """Nodes that start no job, until ``wake()``."""
    state = "scontrol", "update", "NodeName=one-a,one-b"
    slurm.run(*state, "State=DRAIN", "Reason=test")
    awake = cache(lambda: slurm.run(*state, "State=RESUME"))
    yield awake
    awake()


@pytest.fixture(scope="module")
def waiting(slurm, wake, tmp_path_factory):
    """Two pipelines in the queue of nodes that start nothing, launched from a copy of the code that was edited."""
    source = Source(tmp_path_factory.mktemp("source"))
    source.module.write_text(f"{source.module.read_text()}# edited before\n")
    environment = {"PYTHONPATH": str(source.folder)}
    both = [Small(slurm, tmp_path_factory.mktemp(name)) for name in ("first", "second")]
    for small in both:
        small.write()
    at_once = [both[0].start(environment=environment) for _ in range(2)] + [both[1].start(environment=environment)]
    ended = [process.communicate(timeout=60)[1] for process in at_once]
    return both, source, environment, list(zip((process.returncode for process in at_once), ended, strict=True))


def test_of_two_launches_of_one_run_at_once_one_submits_and_another_run_is_no_hindrance(waiting):
    (first, second), _, _, ((code, said), (other_code, other_said), (apart, _)) = waiting
    assert apart == 0
    assert {code, other_code} <= {0, 2}
    assert all("is in use by process" in text for text in (said, other_said) if text)
    for small in (first, second):
        ids = {id.partition("_")[0] for id in PipelineRun(small.run).record().slurm_ids()}
        assert {line.split()[0] for line in small.queued()} == ids
        assert len(ids) == 3


def test_what_is_queued_is_left_alone_and_is_not_to_be_changed(waiting):
    (small, _), _, environment, _ = waiting
    run = PipelineRun(small.run)
    before, config = run.record().jobs, run.config("report")
    again = small.launch("jobs.report.set.resources.threads=3", environment=environment)  # harmless, but too late
    assert again.returncode == 0, again.stderr
    assert "report: queued already: " in again.stdout
    assert (run.record().jobs, run.config("report")) == (before, config)
    for words, says in (
        (
            ["jobs.shards.set.seed=7"],
            "job 'shards' is queued or running with another config (seed: 0 → 7); first: stpredict cancel",
        ),
        (["--rerun", "shards"], "--rerun: shards, report queued or running; first: stpredict cancel"),
    ):
        refused = small.launch(*words, environment=environment)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert says in refused.stderr
    here = small.launch(here=True)
    assert here.returncode == 2
    assert "SLURM has shards, report of it queued or running; wait, launch it with --cluster" in here.stderr


def test_jobs_run_the_code_of_their_launch_however_it_is_edited_afterwards_and_whatever_lies_around(waiting, wake):
    (small, other), source, *_ = waiting
    source.module.write_text("raise RuntimeError('edited after the launch')\n")
    (small.folder / "stpredict").mkdir()  # the jobs' working directory
    (small.folder / "stpredict" / "__init__.py").write_text("raise RuntimeError('of the working directory')\n")
    wake()
    for pipeline in (small, other):
        pipeline.wait_done()
    recorded = yaml.safe_load(Run(small.run / "report").environment_path.read_text())
    assert recorded["git_commit"] == source.git("rev-parse", "HEAD").strip()
    assert "+# edited before" in recorded["git_diff"]
    assert "edited after" not in recorded["git_diff"]
    shutil.rmtree(small.folder / "stpredict")


def test_only_what_is_not_done_is_submitted_again_with_what_its_harmless_keys_say_now(waiting, wake):
    (small, _), *_ = waiting
    wake()
    small.wait_done()
    finished = Run(small.run / "shards").status().finished
    Run(small.run / "report").update_status(state="failed")
    launched = small.launch("jobs.report.set.resources.time='00:07:00'")
    assert launched.returncode == 0, launched.stderr
    assert "shards: up to date" in launched.stdout
    (submitted,) = PipelineRun(small.run).record().jobs["report"].submitted
    assert small.slurm.about(submitted.slurm_id)["TimeLimit"] == "00:07:00"
    small.wait_done()
    assert Run(small.run / "shards").status().finished == finished
    changed = small.launch("jobs.shards.set.seed=7")
    assert changed.returncode == 2
    assert "(seed: 0 → 7); --rerun shards makes it and what needs it anew" in changed.stderr
    anew = small.launch("jobs.shards.set.seed=7", "--rerun", "shards")
    assert anew.returncode == 0, anew.stderr
    record = PipelineRun(small.run).record()
    small.slurm.run("scancel", *record.slurm_ids())
    assert [[one.part for one in job.submitted] for job in record.jobs.values()] == [[0, 1, None], [None]]
    assert Run(small.run / "shards.old-1").status().finished == finished
    assert Run(small.run / "report.old-1").status().state == "done"


def test_one_job_alone_is_a_pipeline_of_itself(slurm, tmp_path):
    small = Small(slurm, tmp_path)
    small.data = {**small.data["jobs"]["shards"]["set"], "kind": "shard", "run": str(small.run), "parts": 2}
    small.data["source"]["kind"] = "moving_digits"
    launched = small.launch("--json")
    assert launched.returncode == 0, launched.stderr
    job = json.loads(launched.stdout)["jobs"]["shard"]
    assert (job["action"], [(one["part"], one["merge"]) for one in job["submitted"]]) == (
        "run",
        [(0, False), (1, False), (None, True)],
    )
    assert "#SBATCH --array=0-1%2" in Path(job["submitted"][0]["script"]).read_text()
    small.wait_done()
    assert Run(small.run / "shard").status().state == "done"


def test_an_array_of_which_a_task_is_gone_is_waited_for_and_then_submitted_anew_with_what_needs_it(slurm, tmp_path):
    small = Small(slurm, tmp_path)
    later = {"options": {"begin": "now+3600"}}
    assert small.launch(profile=later).returncode == 0
    first = PipelineRun(small.run).record()
    array = first.jobs["shards"].submitted[0].slurm_id.partition("_")[0]
    slurm.run("scancel", f"{array}_1")
    refused = small.launch(profile=later)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "job 'shards': task 1 ended without finishing, while others of it are queued" in refused.stderr
    slurm.run("scancel", array)
    again = small.launch(profile=later)
    assert again.returncode == 0, again.stderr
    second = PipelineRun(small.run).record()
    assert not set(first.slurm_ids()) & set(second.slurm_ids())
    slurm.run("scancel", *second.slurm_ids())
    slurm.wait_for(lambda: not small.queued())
