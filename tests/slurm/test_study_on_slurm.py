"""A study on a real SLURM. Its trials shard a few videos each, and so need no torch."""

import json
from pathlib import Path

import pytest
import yaml

from launcher.record import PipelineRun
from stpredict.run import Run, Status
from tests.data_pipeline.numbered_videos import make_videos
from tests.slurm.small_pipeline import PROFILE

pytestmark = pytest.mark.slurm


class Study:
    """Trials a to e, two at once; b fails, since its videos are not there yet, and a is requeued while it runs."""

    def __init__(self, slurm, folder: Path):
        self.slurm, self.folder, self.run, self.path = slurm, folder, folder / "run", folder / "study.yaml"
        self.videos, self.cluster = folder / "videos", folder / "cluster.yaml"
        self.cluster.write_text(yaml.safe_dump(PROFILE))
        digits = {"kind": "moving_digits", "validation_videos": 2, "frames": 4}
        self.sources = {name: {**digits, "videos": 8, "seed": ord(name)} for name in "acde"}
        self.sources["b"] = {"kind": "folder", "path": str(self.videos)}

    def write(self) -> None:
        values = {name: {"shards": {"set": {"source": source}}} for name, source in sorted(self.sources.items())}
        study = {"kind": "study", "name": "shards", "run": str(self.run), "at_once": 2}
        shards = {"set": {"kind": "shard"}}
        self.path.write_text(
            yaml.safe_dump({**study, "grid": {"data": {"values": values}}, "trial": {"shards": shards}})
        )

    def launch(self, *words: str) -> dict[str, str]:
        """What `stpredict study` does with each job."""
        self.write()
        told = self.slurm.run("stpredict", "study", self.path, "--cluster", self.cluster, "--json", *words)
        return {name: job["action"] for name, job in json.loads(told)["jobs"].items()}

    def id(self, job: str) -> str:
        return PipelineRun(self.run).record().jobs[job].submitted[0].slurm_id

    def status(self, trial: str) -> Status | None:
        return Run(self.run / f"{trial}-shards").status()

    def wait_for(self, trial: str, state: str) -> None:
        self.slurm.wait_for(lambda: (status := self.status(trial)) is not None and status.state == state, 60)

    def states(self) -> dict[str, str]:
        """Trial → what `stpredict status` says of it."""
        rows = json.loads(self.slurm.run("stpredict", "status", self.run, "--json"))
        return {row["job"].removesuffix("-shards"): row["state"] for row in rows}

    def wait(self) -> None:
        queue = ["squeue", "--noheader", "--format=%i %o"]
        self.slurm.wait_for(lambda: str(self.run) not in self.slurm.run(*queue), 90)


@pytest.fixture(scope="module")
def study(slurm, tmp_path_factory) -> Study:
    return Study(slurm, tmp_path_factory.mktemp("study"))


def most_at_once(statuses: list[Status]) -> int:
    """Of jobs that have ended."""
    starts = [status.started for status in statuses]
    return max(sum(status.started <= at < status.finished for status in statuses) for at in starts)


def test_a_failed_trial_gives_its_place_to_the_next_and_a_requeued_one_keeps_it(study):
    assert set(study.launch().values()) == {"run"}
    study.slurm.wait(study.id("a-shards"), "RUNNING")
    study.slurm.run("scontrol", "requeue", study.id("a-shards"))
    study.wait_for("d", "done")  # which has the place of b
    assert study.status("b").state == "failed"
    assert study.status("d").started >= study.status("b").finished
    study.slurm.requeued(study.id("a-shards"))
    c = study.slurm.about(study.id("c-shards"))
    assert (c["JobState"], c["Reason"], study.status("c")) == ("PENDING", "Dependency", None)


def test_a_study_that_is_cancelled_goes_on_and_reports_in_spite_of_a_failure_never_more_at_once_than_it_says(study):
    study.slurm.run("stpredict", "cancel", study.run)
    assert study.states().items() >= {"a": "cancelled", "b": "failed", "c": "cancelled", "d": "done"}.items()
    study.slurm.run("stpredict", "resume", study.run)
    study.wait()
    assert study.states() == {"a": "done", "b": "failed", "c": "done", "d": "up to date", "e": "done", "report": "done"}
    trials = [study.status(name) for name in "abcde"]
    assert most_at_once(trials) <= 2
    assert Run(study.run / "report").status().started >= max(status.finished for status in trials)


def test_the_next_launch_does_the_failed_trial_and_what_the_grid_has_got_since_and_reports_again(study):
    before = Run(study.run / "report").status().finished
    make_videos(study.videos, 6)
    study.sources["aa"] = {**study.sources["a"], "seed": 7}
    actions = study.launch()
    assert {name: action for name, action in actions.items() if action != "skip"} == {
        "aa-shards": "run",
        "b-shards": actions["b-shards"],
        "report": "continue",
    }
    assert actions["b-shards"] in ("run", "continue")
    study.wait()
    assert set(study.states().values()) == {"done", "up to date"}
    assert Run(study.run / "report").status().finished > before
