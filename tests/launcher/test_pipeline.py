import json
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UsageError
from launcher.config import LocalCluster, load_cluster
from launcher.launch import launch
from launcher.local_pipeline import LocalExecutor
from launcher.pipeline import load_pipeline, plan
from stpredict.run import Run

EVALUATE = {"kind": "evaluate", "run": "runs/own", "generated": "???"}


class Pipeline:
    """A pipeline file first → second → report, and what it takes to change and launch it."""

    def __init__(self, folder, fake):
        self.folder, self.fake = folder, fake
        self.path = folder / "configs" / "pipelines" / "p.yaml"
        self.path.parent.mkdir(parents=True)
        (self.path.parent / "job.yaml").write_text(yaml.safe_dump(EVALUATE))
        (self.path.parent / "page.yaml").write_text(yaml.safe_dump({"kind": "report", "run": "x", "runs": {}}))
        self.data = {
            "kind": "pipeline",
            "name": "p",
            "run": str(folder / "runs" / "p"),
            "vars": {"videos": "/videos"},
            "jobs": {
                "page": {"config": "page.yaml", "needs": ["second"], "set": {"runs": {"second": "${run:second}"}}},
                "second": {"config": "job.yaml", "needs": ["first"], "set": {"generated": "${run:first}/samples"}},
                "first": {"config": "job.yaml", "set": {"generated": "${vars.videos}"}},
            },
        }

    def load(self, *overrides):
        self.path.write_text(yaml.safe_dump(self.data))
        return load_pipeline(self.path, overrides)

    def launch(self, *ranks, rerun=(), overrides=()):
        return self.launch_with(self.fake(*(ranks or ["ok"])), rerun, overrides)

    def launch_with(self, running, rerun=(), overrides=(), cluster=LocalCluster()):  # noqa: B008
        executor = LocalExecutor(cluster, running)
        return launch(*self.load(*overrides), cluster, rerun, executor=executor)

    def run(self, job):
        return Run(self.folder / "runs" / "p" / job)


@pytest.fixture
def pipeline(tmp_path, fake_running):
    return Pipeline(tmp_path, fake_running)


def test_jobs_come_after_those_they_need_and_values_come_from_vars_and_runs(pipeline):
    config, jobs = pipeline.load()
    assert [job.name for job in jobs] == ["first", "second", "page"]
    assert str(jobs[0].config.generated) == "/videos"
    assert jobs[1].config.generated == config.run / "first" / "samples"
    assert jobs[1].config.run == config.run / "second"
    assert jobs[2].config.runs == {"second": config.run / "second"}


def test_overrides_reach_the_jobs(pipeline):
    _, jobs = pipeline.load("vars.videos=/mine", "jobs.second.set.seed=7")
    assert str(jobs[0].config.generated) == "/mine"
    assert jobs[1].config.seed == 7


def test_the_run_directory_is_named_after_the_pipeline_by_default(pipeline):
    del pipeline.data["run"]
    assert str(pipeline.load()[0].run) == "runs/p"


def change(data, job, **changes):
    data["jobs"][job] = {**data["jobs"][job], **changes}


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("first", {"needs": ["page"]}, r"circle: .*first.*page.*second"),
        ("first", {"needs": ["zero"]}, r"'first' needs 'zero', which is not one of first, page, second"),
        ("first", {"set": {"generated": "${run:page}"}}, r"'first' reads \$\{run:page\} but does not need it"),
        ("first", {"set": {"generated": "x", "sed": 1}}, r"job 'first'.*unknown key 'sed'; did you mean 'seed'"),
        ("first", {"set": {}}, r"job 'first'.*'generated'.*no value"),
        ("first", {"set": {"generated": "${vars.video}"}}, r"jobs.first.set.generated.*'vars.video' not found"),
        ("first", {"config": "nope.yaml"}, r"job 'first'.*nope.yaml: no such config file \(paths are"),
        ("first", {"need": []}, r"unknown key 'jobs.first.need'; did you mean 'needs'"),
    ],
)
def test_a_wrong_pipeline_is_refused_before_anything_starts(pipeline, job, changes, message):
    change(pipeline.data, job, **changes)
    with pytest.raises(UsageError, match=message):
        pipeline.launch()
    assert not (pipeline.folder / "runs").exists()


def test_a_launch_runs_everything_once_and_prints_the_report_last(pipeline, capsys):
    assert pipeline.launch() == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(pipeline.run("page").path / "report.html")
    assert list(yaml.safe_load((pipeline.folder / "runs/p/pipeline.yaml").read_text())["jobs"])
    assert pipeline.launch("crash") == 0
    assert "second: up to date" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "state"), [("2", "failed"), ("75", "preempted")])
def test_a_job_that_is_not_done_stops_the_pipeline_and_the_next_launch_goes_on_from_there(
    pipeline, capsys, status, state
):
    calls = []

    def running(config, name, *rest, **more):
        calls.append(name)
        rank = status if name == "second" and calls.count("second") == 1 else "ok"
        return (yield from pipeline.fake(rank)(config, name, *rest, **more))

    assert pipeline.launch_with(running) == int(status)
    assert pipeline.run("second").status().state == state
    assert "not run: page" in capsys.readouterr().out
    assert pipeline.launch_with(running) == 0
    assert calls == ["first", "second", "second", "page"]


def test_a_changed_key_is_named_and_rerun_keeps_the_old_runs_of_the_job_and_its_dependents(pipeline):
    pipeline.launch()
    change(pipeline.data, "second", set={"generated": "${run:first}/other"})
    with pytest.raises(UsageError, match=r"'second'.*generated: .*samples → .*other.*--rerun second"):
        pipeline.launch()
    assert pipeline.launch(rerun=["second"]) == 0
    assert not pipeline.run("first.old-1").path.exists()
    assert "samples" in pipeline.run("second.old-1").config_path.read_text()
    assert pipeline.run("page.old-1").status().state == "done"
    assert "other" in pipeline.run("second").config_path.read_text()
    assert pipeline.launch(rerun=["second"]) == 0
    assert pipeline.run("second.old-2").path.exists()


@pytest.mark.parametrize("where", ["", "first", "second"])
def test_a_persons_own_folders_are_refused_before_anything_is_written_there(pipeline, where):
    own = pipeline.folder / "runs" / "p" / where / "own" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.touch()
    for rerun in ([], ["first"]):
        with pytest.raises(UsageError, match="is not empty and not a run directory"):
            pipeline.launch(rerun=rerun)
    files = [path for path in (pipeline.folder / "runs").rglob("*") if path.is_file() and path.name != ".lock"]
    assert files == [own]


def test_another_config_made_where_a_job_failed_early_is_not_taken_for_that_job(pipeline, fake):
    pipeline.launch("2")
    (pipeline.run("first").path / "pid_0").unlink()  # of the fake rank: a real one leaves nothing so early
    other = pipeline.load()[1][0].config.model_copy(update={"seed": 7})
    assert fake("ok")(other) == 0  # `stpredict evaluate other.yaml run=runs/p/first`
    with pytest.raises(UsageError, match=r"'first'.*has another config \(seed: 7 → 0\)"):
        pipeline.launch()


def test_a_job_of_a_pipeline_continued_alone_stays_the_pipelines(pipeline, fake):
    pipeline.launch("ok")
    second = pipeline.load()[1][1].config
    pipeline.run("second").update_status(state="preempted")
    assert fake("ok")(second) == 0
    assert set(plan(pipeline.load()[1]).values()) == {"skip"}


def test_keys_that_change_no_result_leave_a_job_up_to_date(pipeline):
    pipeline.launch()
    change(pipeline.data, "first", set={"generated": "/videos", "resources": {"threads": 2}})
    assert set(plan(pipeline.load()[1]).values()) == {"skip"}


def test_a_change_upstream_changes_the_fingerprints_downstream(pipeline):
    before = {job.name: job.fingerprint for job in pipeline.load()[1]}
    after = {job.name: job.fingerprint for job in pipeline.load("jobs.first.set.seed=1")[1]}
    assert all(before[name] != after[name] for name in ("first", "second", "page"))


def test_work_made_from_a_run_that_is_gone_is_not_silently_kept(pipeline):
    pipeline.launch()
    pipeline.run("first").path.rename(pipeline.folder / "gone")
    with pytest.raises(UsageError, match=r"'second' has work.*--rerun second"):
        pipeline.launch()
    assert pipeline.launch(rerun=["first"]) == 0


def test_a_preempted_job_continues_in_its_directory(pipeline):
    pipeline.launch()
    pipeline.run("page").update_status(state="preempted")
    assert plan(pipeline.load()[1]) == {"first": "skip", "second": "skip", "page": "continue"}


def test_rerun_of_no_job_names_the_jobs(pipeline):
    with pytest.raises(UsageError, match=r"--rerun third: no such job; jobs: first, second, page"):
        pipeline.launch(rerun=["third"])


def test_a_cluster_is_a_file_or_a_name_beside_the_pipelines(pipeline):
    clusters = pipeline.folder / "configs" / "clusters"
    clusters.mkdir()
    (clusters / "mine.yaml").write_text("kind: local\nthreads: 3\n")
    assert load_cluster("mine", pipeline.path).threads == 3
    assert load_cluster(str(clusters / "mine.yaml"), pipeline.path).threads == 3
    with pytest.raises(UsageError, match=r"no cluster 'other'.*; there: .*mine"):
        load_cluster("other", pipeline.path)


def test_the_cluster_sets_the_threads_of_ranks(pipeline):
    pipeline.launch_with(pipeline.fake("ok"), cluster=LocalCluster(threads=5))
    assert "threads 5" in pipeline.run("first").log_path(0).read_text()
    assert json.loads(pipeline.run("first").status_path.read_text())["state"] == "done"


def test_an_override_of_a_job_that_is_not_there_names_those_that_are():
    with pytest.raises(UsageError, match=r"has no job 'priorr'; its jobs: shards, tokenizer, .*jobs\.JOB\.set\.KEY"):
        load_pipeline(Path("configs/pipelines/demo.yaml"), ["jobs.priorr.set.training.steps=5"])
