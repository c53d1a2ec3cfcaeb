"""A study is a pipeline of its trials: their names, what each launch does, and every mistake in a grid in one line."""

import json
import re
import subprocess
from collections import Counter
from functools import reduce

import pytest
import yaml

from data_pipeline.errors import UsageError
from launcher.config import LocalCluster, SlurmCluster
from launcher.grid import label_of
from launcher.launch import launch, prepare
from launcher.local_pipeline import LocalExecutor
from launcher.pipeline import load_pipeline, plan
from launcher.preview import preview
from launcher.study import headline, load_study
from launcher.turns import lanes
from stpredict.run import Run

JOB = {"kind": "evaluate", "run": "x", "generated": "???"}
SEEDS = {"key": "judge.set.seed", "values": [0, 1]}


class StudyFile:
    """size (small, large) x seed (0, 1) of two jobs, guess → judge, after ``videos``; and how to launch it."""

    def __init__(self, folder, fake):
        self.folder, self.fake, self.path = folder, fake, folder / "study.yaml"
        (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
        sizes = {name: {"guess": {"set": {"generated": f"/{name}"}}} for name in ("small", "large")}
        self.data = {
            "kind": "study",
            "name": "s",
            "run": str(folder / "runs"),
            "jobs": {"videos": {"config": "job.yaml", "set": {"generated": "/videos"}}},
            "grid": {"size": {"values": sizes}, "seed": SEEDS},
            "trial": {
                "guess": {"config": "job.yaml", "needs": ["videos"]},
                "judge": {"config": "job.yaml", "needs": ["guess"], "set": {"generated": "${run:guess}/samples"}},
            },
        }

    def load(self, *overrides):
        self.path.write_text(yaml.safe_dump(self.data, sort_keys=False))
        return load_study(self.path, overrides)

    def launch(self, what="ok", rerun=()):
        """With ranks that do ``what``, or what it says for the job of a name."""
        begun = []

        def running(config, name, *rest, **more):
            begun.append(name)
            own = what.get(name, "ok") if isinstance(what, dict) else what
            return (yield from self.fake(own)(config, name, *rest, **more))

        _, pipeline, jobs = self.load()
        code = launch(pipeline, jobs, LocalCluster(), rerun, executor=LocalExecutor(LocalCluster(), running))
        return code, begun

    def plan(self, rerun=()):
        """Action → the jobs, in their order."""
        found = {}
        for name, action in plan(self.load().jobs, rerun).items():
            found.setdefault(action, []).append(name)
        return found


@pytest.fixture
def study(tmp_path, fake_running):
    return StudyFile(tmp_path, fake_running)


def test_trials_are_called_after_their_labels_and_read_their_own_runs(study):
    _, pipeline, jobs = study.load()
    by_name = {job.name: job for job in jobs}
    assert list(dict.fromkeys(job.trial for job in jobs if job.trial)) == [
        "small-seed0",
        "small-seed1",
        "large-seed0",
        "large-seed1",
    ]
    judge = by_name["large-seed1-judge"].config
    assert (judge.seed, judge.generated) == (1, pipeline.run / "large-seed1-guess" / "samples")
    assert str(by_name["large-seed1-guess"].config.generated) == "/large"
    assert by_name["large-seed1-guess"].needs == ("videos",)
    assert jobs[-1].name == "report"
    assert set(jobs[-1].after) == {f"{trial}-judge" for trial in study.load().trials}
    at = {name: trial.at for name, trial in jobs[-1].config.trials.items()}
    assert at["small-seed1"] == {"size": "small", "seed": "seed1"}


@pytest.mark.parametrize(
    ("axis", "value", "label"),
    [
        ("seed", 0, "seed0"),
        ("lr", 0.003, "lr3e-3"),
        ("lr", 2.5e-4, "lr2_5e-4"),
        ("block", [1, 1, 8], "block1x1x8"),
        ("data", "a/b c", "dataa_b_c"),
    ],
)
def test_a_value_without_a_label_gets_one_that_can_name_a_folder(axis, value, label):
    assert label_of(axis, value) == label


def lr(values, key="judge.set.resources.memory_gb"):
    return {"grid.lr": {"key": key, "values": values}}


def guesses(**generated):
    """An axis: label → the first job's ``generated``."""
    return {"values": {label: {"guess": {"set": {"generated": value}}} for label, value in generated.items()}}


VIDEOS = {"config": "job.yaml", "set": {"generated": "/videos"}}
MISTAKES = [
    (lr([]), "grid.lr.values is empty; give it a value, or remove the axis"),
    (lr([1, 2, 1]), "grid.lr.values: 1 is there twice; remove one"),
    (lr([0.001, 1e-3]), "grid.lr.values: 0.001 is there twice; remove one"),
    (lr([[1, 2], [1, 2]]), "grid.lr.values: [1, 2] is there twice; remove one"),
    (lr([1.00000001, 1.00000002]), "1.00000001 and 1.00000002 are both called lr1e0; give labels: {LABEL: VALUE}"),
    (lr({"a": 1, "b": 1.0}), "grid.lr.values: 'a' and 'b' are the same value; remove one"),
    (lr({"a": 1, "b/c": 2}), "grid.lr.values: 'b/c' is no label: letters, digits, _ and -"),
    (lr([1], "juge.set.seed"), "grid.lr.key: juge.set.seed: `trial` has no job 'juge'; did you mean judge.set.seed?"),
    (lr([1], "judge.seed"), "grid.lr.key: judge.seed: did you mean judge.set.seed?"),
    (lr([1], "judge.set.sed"), "job 'small-seed0-lr1-judge' (job.yaml): unknown key 'sed'; did you mean 'seed'"),
    (lr([5, 6], "judge.set.seed"), "grid.seed and grid.lr both change judge.set.seed; of one nothing would be left"),
    (lr([0.1, float("nan")], "judge.set.seed"), "grid.lr.values: nan is no finite number"),
    (lr([{}], "judge.set"), "grid.lr.key: judge.set: did you mean judge.set.KEY?"),
    (lr([1], "judge"), "grid.lr.key: judge: did you mean judge.set.KEY?"),
    (lr(3), "key 'grid.lr.values': give a list of values, or label → value"),
    (lr([1, 2], None), "grid.lr: what do its values change? Give `key`, such as guess.set.seed, or label → changes"),
    (lr({"a": 3}, None), "grid.lr.values.a: give changes of `trial`, such as {guess: {set: {seed: 1}}}"),
    (lr({"a": {"jugde": {"set": {}}}}, None), "grid.lr.values.a.jugde: `trial` has no job 'jugde'"),
    (lr({"a": {"judge": {"seed": 3}}}, None), "grid.lr.values.a.judge.seed: did you mean judge: {set: {seed: ...}}?"),
    ({"grid": {}}, "key 'grid' is empty; give it something"),
    ({"grid": ["size"]}, "key 'grid' is ['size']; give keys with values, {KEY: VALUE}"),
    ({"grid.a b": SEEDS}, "key 'grid.a b': 'a b' is no name: letters, digits, _ and -"),
    ({"name": None}, "study.yaml: key 'name' is nothing; give text"),
    ({"analysis": {"predict": 1e10}}, "key 'analysis.predict' is 1e+10; give a list: [1e+10]"),
    ({"analysis": {"predict": [float("inf")]}}, "key 'analysis.predict.0' is inf; give a finite number"),
    ({"without": ["small"]}, "key 'without.0': 'small' names no axis; give axis: label, such as {size: small}"),
    ({"without": {"size": "small"}}, "key 'without' is {'size': 'small'}; give a list"),
    ({"without": [{"size": ["small"]}]}, "key 'without.0': size: give one label; a point for each of several"),
    ({"grid.size": guesses(large="a", big="a")}, "grid.size.values: 'large' and 'big' are the same value; remove one"),
    (
        {
            "grid.seed": {"key": "judge.set.seed", "values": [0]},
            **lr({"a": {"guess": {"array": None}}, "b": {"guess": {"needs": ["videos"]}}}, None),
        },
        "trials small-seed0-a and small-seed0-b would be the same run: between them grid.lr changes nothing; remove",
    ),
    ({"jobs.guess": VIDEOS}, "'guess' is in `jobs`, done once, and in `trial`, done for each; rename one"),
    ({"jobs.report": VIDEOS}, "jobs.report: a study's last job is called so; give it another name"),
    (
        {"jobs.small-seed1-judge": VIDEOS},
        "two jobs are called 'small-seed1-judge', one of trial small-seed1; give it another label",
    ),
    ({"trial.guess.needs": ["vidoes"]}, "trial.guess.needs: 'vidoes' is not one of `trial` or `jobs`: videos, guess"),
    ({"jobs.videos.after": ["judge"]}, "jobs.videos.after: 'judge' is not a job of `jobs`: videos"),
    ({"trial.guess.trial": "a"}, "trial.guess.trial: a study sets it itself; remove it"),
    (
        {
            "grid.size": guesses(**{"a-b": "1", "a": "2"}),
            "grid.seed": {"key": "judge.set.seed", "values": {"c": 1, "b-c": 2}},
        },
        "grid: two trials are called a-b-c: {'size': 'a-b', 'seed': 'c'} and {'size': 'a', 'seed': 'b-c'}",
    ),
    ({"grid": {"size": guesses(videos="a")}}, "grid: a trial is called videos, like a job; give its value a label"),
    ({"without": [{"sise": "small"}]}, "without.0: the grid has no axis 'sise'; its axes: size, seed"),
    ({"without": [{"seed": "0"}]}, "without.0: grid.seed has no value called '0'; there: seed0, seed1"),
    ({"without": [{}]}, "without.0 is empty: give axis: label, or remove it"),
    ({"without": [{"size": "small"}, {"size": "large"}]}, "without: leaves nothing of the grid"),
    ({"kind": "pipeline"}, "has kind pipeline: use `stpredict launch "),
]


@pytest.mark.parametrize(("changes", "says"), MISTAKES)
def test_a_mistake_in_a_grid_is_one_line_that_says_where(study, changes, says):
    for key, value in changes.items():
        *folders, last = key.split(".")
        reduce(dict.__getitem__, folders, study.data)[last] = value
    with pytest.raises(UsageError) as error:
        study.load()
    assert says in str(error.value)
    assert str(error.value).startswith(str(study.path))
    assert "\n" not in str(error.value)
    assert not (study.folder / "runs").exists()


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (["name"], "study.yaml: key 'name' is missing: its run is runs/NAME, unless `run` says otherwise"),
        (["name", "run", "grid", "trial", "jobs"], "study.yaml: keys 'name', 'grid', 'trial' are missing"),
    ],
)
def test_what_is_missing_is_said_once_and_nothing_that_follows_from_it(study, missing, says):
    for key in missing:
        del study.data[key]
    with pytest.raises(UsageError) as error:
        study.load()
    assert str(error.value) == f"{study.folder}/{says}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("grid.sizes.values=[1]", "has no axis 'sizes'; its axes: size, seed (to add one: 'grid.sizes={key: "),
        ("grid[sede].values=[1]", "has no axis 'sede'; its axes: size, seed"),
        ("grid.size.values.smal.guess.set.seed=1", "has no value 'smal'; its values: small, large (to add one: "),
        ("trial.juge.set.seed=1", "has no job 'juge'; its jobs: guess, judge (trial.JOB.set.KEY=value)"),
        ("jobs.vidoes.set.seed=1", "has no job 'vidoes'; its jobs: videos (jobs.JOB.set.KEY=value)"),
        ("vars.tokeniser=1", "has no variable 'tokeniser'; its variables: tokenizer, seed (vars.NAME=value)"),
    ],
)
def test_an_override_of_what_is_not_there_is_refused_and_what_is_there_named(study, override, says):
    study.data["vars"] = {"tokenizer": "???"}
    study.data["trial"]["guess"]["set"] = {"seed": "${vars.seed}"}  # which is given on the command line only
    with pytest.raises(UsageError) as error:
        study.load("vars.tokenizer=a", "vars.seed=1", override)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{override}: {study.path} has no ")


@pytest.mark.parametrize("override", ["grid={}", "grid.size={}", "grid.size.values=[]", "grid.seed.values={}"])
def test_an_override_that_would_empty_an_axis_is_refused(study, override):
    with pytest.raises(UsageError, match=r"grid\S* would be empty; give it a value, or remove it in the file"):
        study.load(override)


def test_an_override_that_puts_a_list_where_keys_are_is_named(study):
    with pytest.raises(UsageError, match=r"override 'jobs=\[1\]': it puts a list where keys are"):
        study.load("at_once=2", "jobs=[1]")


def test_an_axis_or_a_value_may_be_added_whole(study):
    found = study.load(
        "grid.size.values.huge={guess: {set: {generated: /huge}}}",
        "grid.size.values.huge.guess.set.generated=/larger",
        "grid.memory={key: judge.set.resources.memory_gb}",
        "grid.memory.values=[1, 2]",
        "grid.seed.values=[0]",
    )
    assert found.trials == [f"{size}-seed0-memory{gb}" for size in ("small", "large", "huge") for gb in (1, 2)]
    assert str({job.name: job for job in found.jobs}["huge-seed0-memory1-guess"].config.generated) == "/larger"


def test_a_study_is_not_launched_as_a_pipeline_and_a_run_is_no_study(study):
    study.load()
    with pytest.raises(UsageError, match=rf"is a study: use `stpredict study {re.escape(str(study.path))}`"):
        load_pipeline(study.path)
    with pytest.raises(UsageError, match=r"is a folder; give a study's YAML .*`stpredict resume"):
        load_study(study.folder)


def test_points_that_are_left_out_are_no_trials(study):
    study.data |= {"without": [{"size": "large", "seed": "seed1"}], "at_once": 2}
    found = study.load()
    assert found.trials == ["small-seed0", "small-seed1", "large-seed0"]
    assert headline(found) == "s: 2 size x 2 seed - 1 left out = 3 trials, 2 at once"


def test_numbers_are_labels_too(study):
    study.data["grid"] = {"size": {"key": "guess.set.generated", "values": {16: "a", 32: "b"}}}
    study.data["without"] = [{"size": 16}]
    assert study.load().trials == ["32"]


@pytest.fixture
def grown(study):
    """Four trials of one job, done; and its report."""
    del study.data["trial"]["guess"]
    study.data["trial"]["judge"] = {"config": "job.yaml", "needs": ["videos"], "set": {"generated": "/x"}}
    sizes = {name: {"judge": {"set": {"generated": f"/{name}"}}} for name in ("small", "large")}
    study.data["grid"]["size"] = {"values": sizes}
    code, begun = study.launch()
    assert (code, len(begun)) == (0, 6)
    assert set(study.plan()) == {"skip"}
    return study


def test_a_study_that_grows_does_what_is_new_and_its_report_wherever_the_value_stands(grown):
    grown.data["grid"]["seed"] = {**SEEDS, "values": [2, 1, 0]}
    assert grown.launch() == (0, ["small-seed2-judge", "large-seed2-judge", "report"])
    grown.data["grid"]["seed"] = {**SEEDS, "values": [0]}
    assert grown.launch() == (0, ["report"])  # of fewer trials
    assert Run(grown.folder / "runs" / "small-seed1-judge").status().state == "done"
    grown.data["analysis"] = {"points": "curve"}
    assert grown.launch() == (0, ["report"])
    assert grown.launch() == (0, [])


def test_an_axis_that_is_added_later_does_nothing_over_that_is_there_under_a_shorter_name(grown, capsys):
    videos = {"values": {"all": {"judge": {"set": {"resources": {"threads": 2}}}}}}
    grown.data["grid"]["videos"] = videos
    runs = grown.folder / "runs"
    with pytest.raises(
        UsageError, match=r"what 4 jobs would make is there under another name.*; rename, or give"
    ) as error:
        grown.launch()
    moves = str(error.value).rpartition("`run`: ")[2]
    assert moves.startswith(f"mv -T {runs}/small-seed0-judge {runs}/small-seed0-all-judge; mv -T ")
    subprocess.run(moves, shell=True, check=True)
    assert grown.launch() == (0, ["report"])
    videos["values"] = {"few": {"judge": {"set": {"generated": "/x"}}}}
    grown.data["grid"] = {"seed": SEEDS, "videos": videos}
    capsys.readouterr()
    assert grown.launch() == (0, ["seed0-few-judge", "seed1-few-judge", "report"])
    assert "no longer part of it, but kept in" in capsys.readouterr().err


def test_of_a_trial_that_failed_only_it_and_the_report_are_done_again(grown):
    grown.data["grid"]["seed"] = {**SEEDS, "values": [3, 4]}
    code, begun = grown.launch({"small-seed4-judge": "1"})
    assert code == 1
    assert begun[-1] == "report"
    assert Counter(begun) == Counter(
        [f"{size}-seed{seed}-judge" for size in ("small", "large") for seed in (3, 4)] + ["report"]
    )
    assert grown.launch() == (0, ["small-seed4-judge", "report"])


def test_a_trial_that_went_on_by_itself_has_the_report_done_again(grown, fake):
    job = next(job for job in grown.load().jobs if job.name == "small-seed0-judge")
    Run(job.run.path).update_status(state="preempted")
    Run(grown.folder / "runs" / "report").update_status(finished="2026-01-01T00:00:00+00:00")
    assert fake("ok")(job.config) == 0
    assert grown.plan()["continue"] == ["report"]


def test_a_trial_with_another_config_is_named_with_the_key_and_rerun_takes_trials_and_jobs_of_all(grown):
    grown.data["trial"]["judge"]["set"]["resources"] = {"threads": 3}
    assert grown.plan() == {"skip": [*grown.plan()["skip"]]}  # harmless
    grown.data["grid"]["size"]["values"]["large"]["judge"]["set"]["generated"] = "/larger"
    with pytest.raises(
        UsageError, match=r"job 'large-seed0-judge': .*\(generated: /large → /larger\); --rerun large-seed0-judge"
    ):
        grown.plan()
    trials = ["large-seed0", "large-seed1"]
    assert grown.plan(rerun=trials)["rerun"] == [f"{trial}-judge" for trial in trials]
    assert len(grown.plan(rerun=["judge"])["rerun"]) == 4
    assert grown.plan(rerun=["judge"])["continue"] == ["report"]
    with pytest.raises(UsageError, match=r"--rerun large-seed9: no such job; jobs: videos, small-seed0-judge"):
        grown.plan(rerun=["large-seed9"])


def test_the_dry_run_of_a_hundred_trials_is_a_page(study, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    study.data["grid"]["seed"] = {**SEEDS, "values": list(range(50))}
    study.data["without"] = [{"size": "large", "seed": "seed49"}]
    config, pipeline, jobs = study.load("at_once=4")
    preview(pipeline, jobs, SlurmCluster(partition="big"), (), "mine", False, config)
    out = capsys.readouterr().out
    assert out.count("#SBATCH --partition=big") == 4  # videos, guess, judge, report
    table = out.rpartition("launcher.slurm.after")[2]
    assert re.search(r"guess of 99 trials +evaluate +videos", table)
    assert re.search(r"judge of 99 trials +evaluate +guess", table)
    assert re.search(r"seed +judge\.set\.seed +seed0  seed1  seed2", table)
    assert "2 size x 50 seed - 1 left out = 99 trials, 4 at once" in table
    assert "…" not in table
    preview(pipeline, jobs, SlurmCluster(partition="big"), (), "mine", True, config)
    shown = json.loads(capsys.readouterr().out)
    assert shown["grid"]["axes"]["size"] == {"key": None, "labels": ["small", "large"]}
    assert (len(shown["grid"]["trials"]), shown["grid"]["at_once"], len(shown["scripts"])) == (99, 4, 200)


def test_trials_follow_each_other_in_as_many_lanes_as_run_at_once():
    assert lanes(["a", "b", "c", "d", "e"], 2, {}) == {"a": (), "b": (), "c": ("a",), "d": ("b",), "e": ("c",)}
    assert lanes(["a", "b"], None, {}) == {"a": (), "b": ()}
    queued = {"p": set(), "q": set(), "r": {"p"}}  # r after p; q
    assert lanes(["a", "b", "c"], 2, queued) == {"a": ("q",), "b": ("r",), "c": ("a",)}
    assert lanes(["a", "b"], 3, queued) == {"a": (), "b": ("q",)}
    assert lanes(["a"], 1, queued) == {"a": ("q", "r")}


def test_under_slurm_a_trial_comes_after_the_last_jobs_of_the_one_whose_place_it_takes(study):
    study.data["at_once"] = 2
    _, pipeline, jobs = study.load()
    planned = prepare(pipeline, jobs, SlurmCluster())
    after = {job.name: planned.turn_after(job) for job in jobs if planned.turn_after(job)}
    assert after == {"large-seed0-guess": ["small-seed0-judge"], "large-seed1-guess": ["small-seed1-judge"]}
    assert planned.record.jobs["large-seed0-guess"].behind == ("small-seed0",)


def test_done_trials_take_no_place(grown):
    grown.data |= {"at_once": 2}
    grown.data["grid"]["seed"] = {**SEEDS, "values": [0, 5, 1, 6]}
    _, pipeline, jobs = grown.load()
    planned = prepare(pipeline, jobs, SlurmCluster())
    after = {job.name: planned.turn_after(job) for job in jobs if planned.turn_after(job)}
    assert after == {"large-seed5-judge": ["small-seed5-judge"], "large-seed6-judge": ["small-seed6-judge"]}


def test_a_trials_turn_comes_after_what_is_left_of_the_one_before(study):
    """Of two jobs that nothing needs, one is done."""
    study.data["trial"]["guess"]["set"] = {"generated": "/x"}
    study.data["trial"]["judge"] |= {"needs": ["videos"], "set": {"generated": "/y"}}
    study.data |= {"at_once": 1, "without": [{"size": "large"}]}
    study.launch({"small-seed0-judge": "1", "small-seed1-guess": "1", "small-seed1-judge": "1"})
    _, pipeline, jobs = study.load()
    planned = prepare(pipeline, jobs, SlurmCluster())
    assert planned.actions["small-seed0-guess"] == "skip"
    assert planned.turn_after(next(job for job in jobs if job.name == "small-seed1-guess")) == ["small-seed0-judge"]


@pytest.mark.parametrize("overrides", [(), ("grid.seed.values={a: 1}",)])
def test_keys_where_the_base_has_a_list_are_one_line(study, overrides):
    study.load()
    more = study.folder / "more.yaml"
    more.write_text(yaml.safe_dump({"base": "study.yaml", "grid": {"seed": {"values": {"a": 1}}}}))
    with pytest.raises(
        UsageError, match=r"does not fit its base study\.yaml|override 'grid\.seed\.values={a: 1}': it puts"
    ) as error:
        load_study(study.path if overrides else more, overrides)
    assert "\n" not in str(error.value)
