"""Several jobs at once on this machine: which run together, what each gets of it, and how they end together."""

import os
import signal
import threading
import time

import psutil
import pytest
import yaml

from launcher.config import LocalCluster
from launcher.launch import launch
from launcher.local_pipeline import LocalExecutor
from launcher.pipeline import load_pipeline
from launcher.progress import Watch
from launcher.rundir import locked
from launcher.share import Gpus, gpus_here, threads_of
from stpredict.jobs.config import EvaluateConfig, GenerateConfig, Resources
from stpredict.run import Run


@pytest.fixture
def pipeline(tmp_path):
    """``pipeline(a={}, b={"needs": ["a"]}, at_once=1)`` is one of such jobs, in tmp_path/run."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"kind": "evaluate", "run": "x", "generated": "/videos"}))

    def write(at_once=None, **jobs):
        data = {"kind": "pipeline", "name": "p", "run": str(tmp_path / "run"), "at_once": at_once}
        data["jobs"] = {name: {"config": "job.yaml", **job} for name, job in jobs.items()}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        return load_pipeline(tmp_path / "p.yaml")

    return write


class Recorder:
    """In place of jobs: each lasts for so many looks; what ran together is remembered."""

    def __init__(self, **looks):
        self.looks, self.now, self.begun, self.together, self.given = looks, set(), [], set(), {}

    def __call__(self, config, name, print_of, threads, **more):
        self.begun.append(name)
        self.given[name] = {"threads": threads, **more}
        self.now.add(name)
        for _ in range(self.looks.get(name, 3)):
            self.together.add(frozenset(self.now))
            yield
        self.now.discard(name)
        Run(config.run).update_status(kind=config.kind, state="done", fingerprint=print_of)
        return 0

    def launch(self, loaded, **cluster):
        cluster = LocalCluster(**cluster)
        return launch(*loaded, cluster, executor=LocalExecutor(cluster, self))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr("launcher.local_pipeline.POLL_S", 0.001)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_as_many_jobs_run_at_once_as_the_profile_says_each_when_what_it_waits_for_has_ended(pipeline):
    loaded = pipeline(a={}, b={}, c={}, d={"needs": ["a"]}, e={"after": ["b", "d"]})
    recorder = Recorder(b=9)
    assert recorder.launch(loaded, jobs=2) == 0
    assert recorder.begun == ["a", "b", "c", "d", "e"]
    assert max(map(len, recorder.together)) == 2
    assert {"b", "c"} in recorder.together
    assert {"b", "d"} in recorder.together
    assert not any("e" in together and len(together) > 1 for together in recorder.together)


def test_one_after_another_is_the_default(pipeline):
    recorder = Recorder()
    assert recorder.launch(pipeline(a={}, b={}, c={})) == 0
    assert max(map(len, recorder.together)) == 1
    assert recorder.given["a"] | {"code": None} == {
        "threads": None,
        "gpus": None,
        "stops": [],
        "bars": None,
        "code": None,
    }


def test_of_trials_no_more_run_than_at_once_says_and_each_is_finished_before_the_next(pipeline):
    jobs = {f"{trial}-{job}": {"trial": trial} for trial in "abc" for job in ("x", "y")}
    for trial in "abc":
        jobs[f"{trial}-y"]["needs"] = [f"{trial}-x"]
    recorder = Recorder()
    assert recorder.launch(pipeline(1, other={}, **jobs), jobs=4) == 0
    assert [name for name in recorder.begun if name != "other"] == ["a-x", "a-y", "b-x", "b-y", "c-x", "c-y"]
    assert {"other", "a-x"} in recorder.together  # which is of no trial
    recorder = Recorder()
    others = {f"{name}2": job | {"needs": [], "set": {"seed": 1}} for name, job in jobs.items()}
    assert recorder.launch(pipeline(2, **others), jobs=9) == 0
    assert max(len({name[0] for name in together}) for together in recorder.together) == 2


def test_cores_are_shared_by_jobs_and_ranks_unless_the_profile_says_how_many_threads(pipeline, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    recorder = Recorder()
    recorder.launch(pipeline(a={"set": {"resources": {"processes": 2}}}, b={}), jobs=3)
    assert (recorder.given["a"]["threads"], recorder.given["b"]["threads"]) == (2, 4)
    recorder.launch(pipeline(c={"set": {"seed": 1}}), jobs=3, threads=5)
    assert recorder.given["c"]["threads"] == 5
    job = EvaluateConfig(run="x", generated="x", resources=Resources(processes=8))
    assert [threads_of(job, jobs, 4) for jobs in (1, 2)] == [1, 1]


def needing(ranks):
    data = {"shards": "x", "clip": {"frames": 1, "size": [8, 8]}}
    return GenerateConfig(run="x", prior="x", tokenizer="x", data=data, resources=Resources(processes=ranks))


def test_no_gpu_is_given_to_two_jobs():
    gpus = Gpus(["0", "1", "2"])
    assert gpus.take("a", needing(2)) == ["0", "1"]
    assert gpus.take("b", needing(2)) is None
    assert gpus.take("c", needing(1)) == ["2"]
    assert gpus.take("d", EvaluateConfig(run="x", generated="x")) == []
    gpus.give_back("a")
    assert gpus.take("b", needing(9)) is None
    gpus.give_back("c")
    assert gpus.take("b", needing(9)) == ["0", "1", "2"]
    assert Gpus([]).take("a", needing(2)) == []


def test_the_gpus_that_are_shared_out_are_those_that_the_launcher_sees(tmp_path, monkeypatch):
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert gpus_here({"CUDA_VISIBLE_DEVICES": ""}) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus_here({}) == ["GPU-aa", "GPU-bb"]
    tool.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert gpus_here({}) == []


def test_a_job_waits_for_a_gpu_and_sees_no_other(pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("launcher.share.WITHOUT_GPU", ())
    recorder = Recorder()
    assert recorder.launch(pipeline(a={}, b={}, c={}), jobs=3) == 0
    assert max(map(len, recorder.together)) == 2
    assert [recorder.given[name]["gpus"] for name in "abc"] == [["4"], ["7"], ["4"]]


def test_ranks_see_the_gpus_that_their_job_was_given(job, tmp_path):
    import sys

    from launcher import local

    code = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"
    local.to_the_end(local.running(job(), gpus=["4", "7"], command=lambda _: [sys.executable, "-c", code]))
    assert "sees 4,7" in Run(tmp_path / "run").log_path(0).read_text()


def launch_really(loaded, fake_running, jobs, **what):
    """With ranks that do ``what`` for the job of a name, or end well."""

    def running(config, name, *rest, **more):
        return (yield from fake_running(what.get(name, "ok"))(config, name, *rest, **more))

    return launch(*loaded, LocalCluster(jobs=jobs), executor=LocalExecutor(LocalCluster(jobs=jobs), running))


def states(tmp_path, names):
    return {name: status.state if (status := Run(tmp_path / "run" / name).status()) else None for name in names}


def signal_when_running(tmp_path, names, *numbers):
    def send():
        while not all((tmp_path / "run" / name / "pid_0").exists() for name in names):
            time.sleep(0.05)
        for number in numbers:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_one_that_fails_ends_no_other_and_keeps_only_what_needs_it(pipeline, fake_running, tmp_path, capsys):
    loaded = pipeline(a={}, b={}, c={"needs": ["a"]}, d={"needs": ["b"]}, e={"after": ["c", "d"]})
    assert launch_really(loaded, fake_running, 2, a="1") == 1
    assert states(tmp_path, "abcde") == {"a": "failed", "b": "done", "c": None, "d": "done", "e": "done"}
    out, errors = capsys.readouterr()
    assert "not run: c" in out
    assert "error: a: rank 0 ended with status 1" in " ".join(errors.split())


def test_one_whose_directory_is_in_use_hinders_no_other(pipeline, fake_running, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launcher.rundir.ORPHANS_END_S", 0)
    with locked(tmp_path / "run" / "a"):
        assert launch_really(pipeline(a={}, b={}), fake_running, 2) == 2
    assert states(tmp_path, "b") == {"b": "done"}
    assert "error: a: " in capsys.readouterr().err


def test_an_error_of_ours_over_one_job_is_its_own_status_and_ends_no_other(
    pipeline, fake_running, tmp_path, capsys, monkeypatch
):
    show = Watch.show

    def broken(watch):
        if watch.name == "a" and (tmp_path / "run" / "a" / "pid_0").exists():
            raise RuntimeError("no such bar")
        show(watch)

    monkeypatch.setattr(Watch, "show", broken)
    loaded = pipeline(a={}, b={}, c={"needs": ["a"]}, d={"needs": ["b"]})
    assert launch_really(loaded, fake_running, 2, a="sleep") == 1
    assert states(tmp_path, "abcd") == {"a": "failed", "b": "done", "c": None, "d": "done"}
    assert Run(tmp_path / "run" / "a").status().error == "error of the launcher: RuntimeError: no such bar"
    assert "error: a: internal error: RuntimeError: no such bar (rerun with --debug" in capsys.readouterr().err


def test_an_error_that_ends_the_launcher_leaves_every_job_a_status_and_no_rank(
    pipeline, fake_running, tmp_path, monkeypatch
):
    def broken(*_):
        raise RuntimeError("the loop's own")

    monkeypatch.setattr("launcher.turns.Schedule.end", broken)
    loaded = pipeline(a={}, b={})
    with pytest.raises(RuntimeError, match="the loop's own"):
        launch_really(loaded, fake_running, 2, b="sleep")
    assert states(tmp_path, "ab") == {"a": "done", "b": "preempted"}
    assert Run(tmp_path / "run" / "b").status().error == "ended with the launcher; run again to continue"
    assert not psutil.pid_exists(int((tmp_path / "run" / "b" / "pid_0").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_all_save_and_no_further_one_starts(pipeline, fake_running, tmp_path, capsys, number):
    loaded = pipeline(a={}, b={}, c={})
    signal_when_running(tmp_path, "ab", number)
    assert launch_really(loaded, fake_running, 2, a="save", b="save") == 75
    assert states(tmp_path, "abc") == {"a": "preempted", "b": "preempted", "c": None}
    assert "not run: c" in capsys.readouterr().out
    assert launch_really(loaded, fake_running, 2) == 0


def test_after_a_job_that_was_preempted_by_itself_no_further_one_starts(pipeline, fake_running, tmp_path, capsys):
    """As where the machine ends a rank, but not the launcher: what it ends is to go on later."""
    assert launch_really(pipeline(a={}, b={}), fake_running, 1, a="75") == 75
    assert states(tmp_path, "ab") == {"a": "preempted", "b": None}
    assert "not run: b" in capsys.readouterr().out


def test_a_second_ctrl_c_kills_all(pipeline, fake_running, tmp_path):
    loaded = pipeline(a={}, b={})
    signal_when_running(tmp_path, "ab", signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    assert launch_really(loaded, fake_running, 2, a="deaf", b="deaf") == 75
    assert time.monotonic() - began < 15
