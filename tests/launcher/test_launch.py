"""What a launch changes: all of it or nothing; on this machine, arrays, too."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UsageError, UserError
from launcher.changes import Changes
from launcher.config import LocalCluster, SlurmCluster
from launcher.launch import launch, prepare
from launcher.local_pipeline import LocalExecutor
from launcher.parts import part_runs
from launcher.pipeline import load_pipeline, plan
from launcher.preview import preview
from launcher.record import JobRecord, PipelineRun, Record
from launcher.rundir import locked
from launcher.slurm.task import _check_needs
from stpredict.run import Run

ROOT = Path(__file__).parents[2]
VIDEOS = {"kind": "moving_digits", "videos": 8, "validation_videos": 2, "frames": 4}


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def changes(tmp_path):
    """A file is replaced, one is new, a folder is set aside."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "work").write_text("work")
    (tmp_path / "old").write_text("before")
    changes = Changes()
    changes.write(tmp_path / "old", "after")
    changes.write(tmp_path / "new", "after")
    changes.set_aside(tmp_path / "run")
    return changes


def test_changes_are_made_inside_the_block_and_nothing_else_stays(changes, tmp_path):
    before = tree(tmp_path)
    assert before[tmp_path / "old"] == b"before"
    with changes.made() as moved:
        assert moved == [(tmp_path / "run", tmp_path / "run.old-1")]
    assert {str(path.relative_to(tmp_path)): text for path, text in tree(tmp_path).items()} == {
        "old": b"after",
        "new": b"after",
        "run.old-1/work": b"work",
    }


@pytest.mark.parametrize("what", ["block fails", "folder in use"])
def test_changes_are_undone(changes, tmp_path, what, monkeypatch):
    monkeypatch.setattr("launcher.rundir.ORPHANS_END_S", 0)
    if what == "block fails":
        with pytest.raises(KeyboardInterrupt), changes.made():
            raise KeyboardInterrupt
    else:
        with locked(tmp_path / "run"), pytest.raises(UsageError, match="is in use by"), changes.made():
            pass
    assert {str(path.relative_to(tmp_path)): text for path, text in tree(tmp_path).items()} == {
        "old": b"before",
        "run/work": b"work",
    }


@pytest.fixture
def shards(tmp_path):
    """``shards(array)`` is a pipeline file of one job, which shards a few videos."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"kind": "shard", "run": "x", "source": VIDEOS}))

    def write(array: int | None, name: str = "p") -> Path:
        job = {"config": "job.yaml"} | ({"array": array} if array else {})
        data = {"kind": "pipeline", "name": name, "run": str(tmp_path / "runs" / name), "jobs": {"shards": job}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def sets(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for split in ("train", "val") for path in (run / split).iterdir()
    }


def test_an_array_runs_here_part_by_part_and_leaves_to_the_byte_what_one_job_leaves(shards, tmp_path):
    for name, array in (("alone", None), ("array", 2)):
        assert launch(*load_pipeline(shards(array, name)), LocalCluster()) == 0
    alone, array = (tmp_path / "runs" / name / "shards" for name in ("alone", "array"))
    assert sets(array) == sets(alone)
    assert len(part_runs(array)) == 2
    assert Run(array).status().fingerprint == Run(alone).status().fingerprint
    assert set(plan(load_pipeline(shards(2, "array"))[1]).values()) == {"skip"}
    (job,) = load_pipeline(shards(1, "alone"))[1]
    assert job.array is None  # of one task


def test_of_an_array_that_stopped_halfway_only_the_missing_task_runs_and_never_another_number_of_tasks(
    shards, tmp_path
):
    from launcher.local import running

    calls = []

    def stopping(config, name, *rest, **more):
        calls.append(name)
        return 1 if calls == ["shards.0", "shards.1"] else (yield from running(config, name, *rest, **more))

    def run(array):
        loaded = load_pipeline(shards(array))
        return launch(*loaded, LocalCluster(), executor=LocalExecutor(LocalCluster(), stopping))

    assert run(2) == 1
    for other in (3, None):
        with pytest.raises(
            UsageError, match=r"'shards': .* was begun by 2 tasks; finish it with `array: 2`, or --rerun"
        ):
            run(other)
    assert run(2) == 0
    assert calls == ["shards.0", "shards.1", "shards.1"]
    assert Run(tmp_path / "runs" / "p" / "shards").status().state == "done"


def test_jobs_run_the_code_that_was_there_when_the_launch_began(shards, tmp_path, monkeypatch):
    import launcher.launch
    from launcher.snapshot import ROOT, place_of, snapshot

    source = snapshot(tmp_path / "source")
    monkeypatch.setattr(launcher.launch, "snapshot", lambda folder: snapshot(folder, source))
    monkeypatch.setattr(launcher.launch, "place_of", lambda folder: place_of(folder, source))
    module = source / "stpredict" / "jobs" / "shard.py"

    def edited_meanwhile(config, *rest, code, **more):
        from launcher.local import running

        assert code != ROOT
        module.write_text("raise RuntimeError('edited after the launch')\n")
        monkeypatch.setenv("PYTHONPATH", str(source))
        return (yield from running(config, *rest, code=code, **more))

    loaded = load_pipeline(shards(None))
    assert launch(*loaded, LocalCluster(), executor=LocalExecutor(LocalCluster(), edited_meanwhile)) == 0
    assert "raise" in module.read_text()


def test_code_that_is_edited_while_it_is_copied_is_run_by_no_job(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.launch.place_of", lambda folder: folder / "before-the-edit")
    with pytest.raises(UserError, match="edited while it was copied; launch again"):
        launch(*load_pipeline(shards(None)), LocalCluster())
    assert not (tmp_path / "runs").exists()


def test_a_launch_that_is_refused_leaves_no_folder(shards, tmp_path):
    class Refusing(LocalExecutor):
        def run(self, launch):
            raise UsageError("no")

    with pytest.raises(UsageError):
        launch(*load_pipeline(shards(2)), LocalCluster(), executor=Refusing(LocalCluster()))
    assert not (tmp_path / "runs").exists()


def test_the_run_of_a_job_is_no_place_for_a_pipeline(shards, tmp_path, job, fake):
    pipeline, jobs = load_pipeline(shards(None))
    assert fake("ok")(job()) == 0
    inside = pipeline.model_copy(update={"run": tmp_path / "run"})
    with pytest.raises(UsageError, match=r"is the run of one job; give another `run` for the pipeline"):
        launch(inside, jobs, LocalCluster())


def test_the_run_of_another_pipeline_is_refused(shards, tmp_path, fake_running):
    pipeline, jobs = load_pipeline(shards(None))
    assert launch(pipeline, jobs, LocalCluster(), executor=LocalExecutor(LocalCluster(), fake_running("ok"))) == 0
    other = pipeline.model_copy(update={"name": "q"})
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"is the run of pipeline 'p', not of 'q'; give another `run`"):
        launch(other, jobs, LocalCluster())
    assert tree(tmp_path) == before


def test_one_jobs_config_is_a_pipeline_of_that_job(shards, tmp_path):
    shards(None)
    pipeline, (job,) = load_pipeline(tmp_path / "job.yaml", [f"run={tmp_path / 'mine'}", "parts=3", "seed=7"])
    assert (pipeline.name, pipeline.run) == ("job", tmp_path / "mine")
    assert (job.name, job.run.path, job.array, job.config.seed) == ("shard", tmp_path / "mine" / "shard", 3, 7)
    assert (job.config.part, job.config.parts) == (0, 1)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_needs_no_slurm_and_writes_nothing(shards, tmp_path, capsys, monkeypatch, as_json):
    path = shards(2)
    before = tree(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    cluster = SlurmCluster(partition="big", time="1-00:00:00")
    preview(*load_pipeline(path), cluster, (), "mine", as_json)
    out, errors = capsys.readouterr()
    assert tree(tmp_path) == before
    assert "whether the cluster takes these jobs is not known: no SLURM on this machine" in errors
    if as_json:
        shown = json.loads(out)
        (row,) = shown["jobs"]
        assert (row["nodes"], row["ranks_per_node"], row["time"], row["partition"]) == (1, 1, "1-00:00:00", "big")
        assert list(shown["scripts"]) == ["shards", "shards.merge"]
        code = PipelineRun(tmp_path / "runs" / "p").code
        assert f"export PYTHONPATH={code}/" in shown["scripts"]["shards"]
    else:
        assert "afterok:<id of shards>" in out
        assert "#SBATCH --array=0-1%2" in out


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no SLURM on this machine")
@pytest.mark.skipif(Path("/etc/slurm/slurm.conf").exists(), reason="a cluster is configured")
def test_a_dry_run_needs_no_slurm_conf(shards, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_CONF", raising=False)
    preview(*load_pipeline(shards(2)), SlurmCluster(partition="big", time="1-00:00:00"), (), "mine", False)
    out, errors = capsys.readouterr()
    assert "#SBATCH --array=0-1%2" in out
    assert "whether the cluster takes these jobs is not known: SLURM's commands are here, but no cluster's" in errors


def test_the_table_of_a_dry_run_cuts_no_word_short_and_comes_last(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    preview(*load_pipeline(ROOT / "configs/pipelines/nbp.yaml"), SlurmCluster(partition="big"), (), "mine", False)
    table = capsys.readouterr().out.rpartition("launcher.slurm.after")[2]
    assert "…" not in table
    for word in ("tokenizer", "evaluation", "nodes x ranks", "24:00:00", "partition"):
        assert word in table


def test_a_dry_run_here_shows_what_a_launch_would_do(shards, capsys, fake_running):
    pipeline, jobs = load_pipeline(shards(None))
    assert launch(pipeline, jobs, LocalCluster(), executor=LocalExecutor(LocalCluster(), fake_running("ok"))) == 0
    capsys.readouterr()
    preview(pipeline, jobs, LocalCluster(), (), "local", True)
    assert [row["action"] for row in json.loads(capsys.readouterr().out)["jobs"]] == ["skip"]
    preview(pipeline, jobs, LocalCluster(), ["shards"], "local", True)
    assert [row["action"] for row in json.loads(capsys.readouterr().out)["jobs"]] == ["rerun"]
    assert prepare(pipeline, jobs, LocalCluster()).to_do == []


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (None, "which is not there"),
        ({"state": "failed", "fingerprint": "a"}, "whose state is failed"),
        ({"state": "done", "fingerprint": "b"}, "which was made with another config"),
        ({"state": "done", "fingerprint": "a"}, None),
    ],
)
def test_a_job_begins_only_with_what_its_launch_expected(tmp_path, status, says):
    run = PipelineRun(tmp_path)
    jobs = {"shards": JobRecord(fingerprint="a"), "report": JobRecord(fingerprint="c", needs=("shards",))}
    run.write_record(Record(pipeline="p", cluster_name="c", code="x", launched="2026", jobs=jobs))
    if status:
        Run(tmp_path / "shards").update_status(kind="shard", **status)
    with pytest.raises(UserError, match=says) if says else nullcontext():
        _check_needs(run, "report")
