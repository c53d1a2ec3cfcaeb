import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_pipeline.video_files import write_mp4
from launcher import cli, local
from launcher.jobs import load_job
from launcher.rundir import locked, prepare
from stpredict.jobs.config import FORCE
from stpredict.run import Run
from tests.processes import bounded

ROOT = Path(__file__).parents[2]
COMMANDS = ["shard", "inspect", "train", "encode", "generate", "evaluate", "report", "launch", "status", "logs"]
COMMANDS += ["cancel", "resume", "export", "doctor"]
EVALUATE = {"kind": "evaluate", "run": "runs/a", "generated": "runs/g"}
ENCODE = {"kind": "encode", "run": "runs/a", "tokenizer": "runs/t", "data": {"shards": "runs/s"}}


@pytest.fixture
def stpredict(monkeypatch, tmp_path, capsys):
    """``stpredict("train", "x.yaml")`` → exit status, stdout, stderr; in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STPREDICT_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # main adds to it

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stpredict", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        out, err = capsys.readouterr()
        return raised.value.code or 0, out, err

    return call


def write(path, data):
    path.write_text(yaml.safe_dump(data))
    return path


def test_every_command_has_help_and_the_help_names_every_command(stpredict):
    code, out, _ = stpredict("--help")
    assert code == 0
    for command in COMMANDS:
        assert f" {command} " in out
        assert stpredict(command, "--help")[0] == 0


def test_bad_usage_is_2(stpredict):
    assert stpredict("trian")[0] == 2
    assert stpredict("train")[0] == 2
    assert stpredict("status", "x", "--nope")[0] == 2


def test_a_mendable_error_is_one_line_and_a_traceback_only_with_debug(stpredict):
    assert stpredict("train", "nope.yaml") == (2, "", "error: nope.yaml: no such config file\n")
    code, _, err = stpredict("train", "nope.yaml", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("error: nope.yaml: no such config file\n")


def test_an_unexpected_error_is_one_line_too(stpredict, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("launcher.jobs.load_job", broken)
    message = "error: internal error: ZeroDivisionError: by nought (rerun with --debug for the traceback)\n"
    assert stpredict("train", "x.yaml") == (1, "", message)


def test_ctrl_c_is_130(stpredict, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.jobs.load_job", interrupted)
    assert stpredict("train", "x.yaml")[0] == 130


def test_a_config_of_another_kind_names_the_right_command(stpredict, tmp_path):
    path = write(tmp_path / "e.yaml", EVALUATE)
    code, _, err = stpredict("train", path)
    assert (code, err) == (2, f"error: {path} has kind evaluate: use `stpredict evaluate {path}`\n")
    path = write(tmp_path / "p.yaml", {"kind": "pipeline"})
    assert stpredict("train", path)[2] == f"error: {path} is a pipeline: use `stpredict launch {path}`\n"


def test_a_job_runs_with_overrides_and_prints_its_run_directory(stpredict, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(local, "run_job", fake("ok", "ok"))
    path = write(tmp_path / "c.yaml", ENCODE)
    code, out, _ = stpredict("encode", path, "resources.processes=2", "run=runs/b")
    assert (code, out) == (0, "runs/b\n")
    assert "world 2" in Run("runs/b").log_path(1).read_text()
    assert stpredict("encode", "runs/b/config.yaml")[0] == 0  # the run directory is enough to run it again


def test_a_folder_is_sharded_into_out(stpredict, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(local, "run_job", fake("ok"))
    (tmp_path / "videos").mkdir()
    assert stpredict("shard", "videos")[2] == "error: give the directory to fill: stpredict shard videos OUT\n"
    assert stpredict("shard", "videos", "out", "source.validation_fraction=0.5")[0] == 0
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["source"] == {"kind": "folder", "path": "videos", "validation_fraction": 0.5}
    path = write(tmp_path / "s.yaml", {"kind": "shard", "run": "own", "source": {"kind": "moving_digits"}})
    assert stpredict("shard", path, "other")[1] == "other\n"
    assert stpredict("shard", path)[1] == "own\n"


def test_shards_go_to_a_folder_and_come_from_one(stpredict, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "clip.avi").write_bytes(b"RIFF")
    for arguments, says in (
        (("videos", "s3://bucket/out"), "s3://bucket/out: shards are written to a folder; copy it"),
        (("clip.avi", "out"), "clip.avi: is a file; give a folder of videos"),
    ):
        status, _, error = stpredict("shard", *arguments)
        assert status == 2
        assert says in error
        assert error.count("\n") == 1
    path = write(tmp_path / "s.yaml", {"kind": "shard", "run": "gs://b/x", "source": {"kind": "moving_digits"}})
    assert "a run directory is a folder, not a URL" in stpredict("shard", path)[2]
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(("s3", "gs"))]


def test_an_override_in_the_place_of_out_is_an_override(stpredict, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(local, "run_job", fake("ok"))
    path = write(tmp_path / "s.yaml", {"kind": "shard", "run": "own", "source": {"kind": "moving_digits"}})
    assert stpredict("shard", path, "source.videos=9", "seed=3")[:2] == (0, "own\n")
    config = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    assert (config["source"]["videos"], config["seed"]) == (9, 3)
    (tmp_path / "a=b").mkdir()
    assert stpredict("shard", path, "a=b")[1] == "a=b\n"


def test_the_configs_that_help_names_exist(stpredict):
    for command in COMMANDS:
        for name in re.findall(r"configs/\S+\.yaml", stpredict(command, "--help")[1]):
            assert (ROOT / name).is_file(), name


def test_videos_left_out_are_said_at_the_end(stpredict, tmp_path):
    for index in range(5):
        write_mp4(tmp_path / "videos" / f"{index}.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=10)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"nothing" * 100)
    code, out, err = stpredict("shard", "videos", "out")
    assert (code, out) == (0, "out\n")
    line = "1 of 6 samples could not be read and were left out; `skipped` in out/*/shard-*.json names them and says why"
    assert err.splitlines()[-1] == f"shard: {line}"
    assert line in Run("out").log_path(0).read_text()
    assert "broken.mp4" in Run("out").log_path(0).read_text()
    assert "skipped" in stpredict("inspect", "out")[1]


def test_ranks_found_leave_the_run_of_a_living_job_alone(tmp_path):
    """torchrun's or srun's: rank 0 is refused, rank 1 goes on alone and fails at the rendezvous."""
    run = Run(tmp_path / "run")
    path = write(tmp_path / "s.yaml", {"kind": "shard", "run": str(run.path), "source": {"kind": "moving_digits"}})
    refused = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "nowhere"}
    with locked(run.path):
        prepare(run, load_job(path, (), "shard"))
        before = run.status_path.read_bytes()
        for rank, code in (("0", 2), ("1", 1)):
            command = [sys.executable, "-m", "launcher", "shard", str(path)]
            ended = bounded(command, env={**refused, "RANK": rank})
            assert ended.returncode == code, ended.stderr
        assert run.status_path.read_bytes() == before
    assert "nowhere" in run.error_path(1).read_text()


TRAIN = {"kind": "tokenizer", "data": {"shards": "s"}, "training": {"steps": 1, "batch_size": 4}}


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_is_written(stpredict, tmp_path):
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN | {"run": "runs/a"}))
    status, _, err = stpredict("train", "train.yaml", "resources.processes=3")
    assert status == 2
    assert "batch_size 4 does not divide among 3 ranks: 1, 2 or 4 would do" in err
    assert [path.name for path in Path("runs/a").iterdir()] == [".lock"]


def test_a_training_goes_on_under_another_config_only_if_forced(stpredict, fake, monkeypatch):
    monkeypatch.setattr(local, "run_job", fake("ok"))
    monkeypatch.setenv(FORCE, "")  # put back afterwards
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN | {"run": "runs/a"}))
    assert stpredict("train", "train.yaml")[0] == 0
    (Run("runs/a").checkpoints / "step_00000001").mkdir(parents=True)
    status, _, err = stpredict("train", "train.yaml", "training.steps=2")
    assert status == 2
    assert "(training.steps: 1 → 2); give another `run`, or remove that directory, or --force to continue" in err
    assert "already done" in stpredict("train", "train.yaml", "training.zero_stage=3")[2]
    status, _, err = stpredict("train", "train.yaml", "training.steps=2", "--force")
    assert (status, "already done" in err) == (0, False)
    assert yaml.safe_load(Run("runs/a").config_path.read_text())["training"]["steps"] == 2
    monkeypatch.setattr(local, "run_job", fake("2"))
    assert stpredict("train", "train.yaml", "training.steps=3", "--force")[0] == 2  # the model is another one, say
    assert yaml.safe_load(Run("runs/a").config_path.read_text())["training"]["steps"] == 2


def test_launch_dry_run_starts_nothing(stpredict, tmp_path):
    write(tmp_path / "e.yaml", EVALUATE)
    jobs = {"two": {"config": "e.yaml", "needs": ["one"]}, "one": {"config": "e.yaml"}}
    path = write(tmp_path / "p.yaml", {"kind": "pipeline", "name": "p", "jobs": jobs})
    code, out, _ = stpredict("launch", path, "--dry-run")
    assert code == 0
    assert out.index(" one ") < out.index(" two ")
    assert not (tmp_path / "runs").exists()


def test_report_of_a_pipelines_run_is_about_the_jobs_that_started(stpredict, tmp_path, monkeypatch):
    def write_report(title, runs, out):
        out.write_text(f"{title}: {', '.join(runs)}")
        return out

    monkeypatch.setattr("stpredict.evaluation.report.write_report", write_report)
    Run(tmp_path / "p" / "one").write_config("kind: shard\n")
    write(tmp_path / "p" / "pipeline.yaml", {"jobs": {"one": {}, "two": {}}})
    assert stpredict("report", "p") == (0, "p/report.html\n", "")
    assert (tmp_path / "p" / "report.html").read_text() == "p: one"
    assert "nothing that a=1 could change" in stpredict("report", "p", "a=1")[2]
    assert "is not a run directory" in stpredict("report", "nowhere")[2]


def test_status_of_a_run_and_of_a_pipeline(stpredict, tmp_path):
    run = Run(tmp_path / "p" / "one")
    run.update_status(kind="prior", state="running", step=5, steps=10, values={"loss": 0.25}, pid=os.getpid())
    code, out, _ = stpredict("status", tmp_path / "p" / "one")
    assert code == 0
    assert "5/10 steps" in out
    assert "loss 0.25" in out
    write(tmp_path / "p" / "pipeline.yaml", {"jobs": {"one": {}, "two": {}}})
    rows = json.loads(stpredict("status", tmp_path / "p", "--json")[1])
    assert [(row["job"], row["state"]) for row in rows] == [("one", "running"), ("two", "not started")]


def test_logs_are_of_the_last_started_job_unless_named(stpredict, tmp_path):
    for number, job in enumerate(["one", "two"]):
        run = Run(tmp_path / "p" / job)
        run.update_status(kind="prior", state="done", started=f"2026-01-0{number + 1}T00:00:00+00:00")
        run.logs.mkdir()
        run.log_path(0).write_text("".join(f"{job} {line}\n" for line in range(5)))
    write(tmp_path / "p" / "pipeline.yaml", {"jobs": {"one": {}, "two": {}}})
    assert stpredict("logs", "p", "-n", "2")[1] == "two 3\ntwo 4\n"
    assert stpredict("logs", "p", "one", "-n", "1", "-f")[1] == "one 4\n"
    assert json.loads(stpredict("logs", "p", "-n", "1", "--json")[1]) == {"job": "two", "rank": 0, "line": "two 4"}
    assert "has no job 'x'; jobs: one, two" in stpredict("logs", "p", "x")[2]
    assert "logs there: rank_0.log" in stpredict("logs", "p", "one", "--rank", "3")[2]


def test_logs_follow_a_job_to_its_end(tmp_path):
    from launcher.logs import tail

    log = tmp_path / "log"
    log.write_text("a\nb\n")
    answers = iter([True, False])

    def going_on():
        with log.open("a") as file:
            file.write("more\n")
        return next(answers)

    assert list(tail([log], 1, going_on, poll_s=0)) == ["b\n", "more\n", "more\n"]
