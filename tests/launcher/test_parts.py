"""Several jobs fill one run: together they leave what one job leaves, and none harms another's work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UsageError, UserError
from data_pipeline.video_files import write_mp4
from launcher import parts
from launcher.overview import rows
from launcher.pipeline import load_pipeline, plan
from launcher.rundir import is_done, prepare
from stpredict.jobs import shard
from stpredict.jobs.config import ShardConfig
from stpredict.run import Run, now
from tests.processes import bounded, succeeding

PARTS = 3


def make_videos(folder: Path, count: int) -> Path:
    for index in range(count):
        frames = np.full((3, 32, 32, 3), index, np.uint8)
        write_mp4(folder / f"class{index % 2}" / f"{index:03d}.mp4", frames, fps=10)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("few"), 16)


@pytest.fixture
def part(few, tmp_path):
    """``part(1)`` is the config of part 1 in tmp_path/run, which has at least five shards to train on."""

    def make(number, of=PARTS, **changes):
        about = {"source": {"kind": "folder", "path": few}, "min_samples_per_shard": 1, "part": number, "parts": of}
        return ShardConfig(**{"run": tmp_path / "run", **about, **changes})

    return make


def command(videos, run, *overrides) -> list[str]:
    return [sys.executable, "-m", "launcher", "shard", str(videos), str(run), *overrides]


def do(config) -> None:
    """A part's job, in this process."""
    run = Run(config.home)
    prepare(run, config)
    shard.run(config, run)
    run.update_status(state="done", finished=now())


def contents(run) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for split in ("train", "val") for path in (run / split).iterdir()
    }


def times(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def test_parts_at_once_of_which_one_is_killed_and_run_again_leave_what_one_job_leaves(tmp_path):
    videos, run, alone = make_videos(tmp_path / "videos", 120), tmp_path / "run", tmp_path / "alone"
    succeeding(command(videos, alone))
    assert len(list(alone.glob("train/*.tar"))) == 24
    jobs = [
        subprocess.Popen(command(videos, run, f"part={number}", f"parts={PARTS}"), stderr=subprocess.PIPE)
        for number in range(PARTS)
    ]
    home = Run(run / "parts" / f"1-of-{PARTS}")
    while not (run / "train" / "shard-000004.json").exists():  # the second one of part 1
        assert jobs[1].poll() is None, jobs[1].stderr.read()
        time.sleep(0.002)
    jobs[1].kill()
    os.kill(home.status().pid, signal.SIGKILL)
    assert [job.wait(timeout=120) for job in (jobs[0], jobs[2])] == [0, 0]
    assert home.status().state == "running"
    finished = times(run / "train")
    assert "shard-000022.tar" not in finished  # the last one of part 1

    merge = [sys.executable, "-m", "launcher", "merge", str(run)]
    refused = bounded(merge)
    assert refused.returncode == 1
    assert "run part 1 of 3 again" in refused.stderr
    assert [row.state for row in rows(run)] == ["done", "lost", "done"]
    assert not list(run.glob("*/manifest.json"))

    succeeding(command(videos, run, "part=1", f"parts={PARTS}"))
    assert finished.items() <= times(run / "train").items()
    succeeding(merge)
    assert contents(run) == contents(alone)
    assert not list(run.rglob("*.tmp"))


def test_a_merged_run_is_like_that_of_one_job(part, tmp_path):
    do(part(0, 1, run=tmp_path / "alone"))
    for number in range(PARTS):
        do(part(number))
    manifests = parts.merge(tmp_path / "run")
    assert sum(manifest.samples for manifest in manifests.values()) == 16
    run, whole = Run(tmp_path / "run"), part(0, 1)
    assert is_done(run, whole)
    assert not parts.whole_is_done(whole)
    assert parts.whole_is_done(part(2))
    assert contents(run.path) == contents(tmp_path / "alone")
    one, merged = Run(tmp_path / "alone").status(), run.status()
    assert (merged.kind, merged.state, merged.step, merged.steps) == (one.kind, one.state, one.step, one.steps)
    assert merged.fingerprint != Run(part(0).home).status().fingerprint
    with pytest.raises(UsageError, match="was made with another config"):
        parts.whole_is_done(part(2, seed=1))
    before = contents(run.path)
    parts.merge(run.path)
    assert parts.merge(run.path / "train").keys() == {run.path / "train"}
    assert contents(run.path) == before


def test_merging_wants_every_part_done_even_where_no_shard_is_missing(part, tmp_path):
    for number in (0, 1):
        do(part(number, 2))
    Run(part(1, 2).home).update_status(state="running")
    with pytest.raises(UserError, match="part 1 of 2 is not done; wait for it or run it again"):
        parts.merge(tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_part_with_another_config_is_refused_at_its_start_and_named_by_merge(part, tmp_path):
    do(part(0, 2))
    for other in (part(1, 2, seed=1), part(1, 4)):
        with pytest.raises(UsageError, match=r"0-of-2 was made with another config \((seed|parts): "):
            parts.whole_is_done(other)
    assert not parts.whole_is_done(part(1, 2, resources={"processes": 4}, workers=4))
    do(part(1, 2, seed=1))  # at the same moment as part 0, say
    with pytest.raises(UserError, match=r"1-of-2 was made with another config than .*0-of-2 \(seed: 1 → 0\)"):
        parts.merge(tmp_path / "run")


def test_shards_left_by_another_config_are_named_with_their_part(part, tmp_path):
    for number in range(PARTS):
        do(part(number, seed=number == 1))
    Run(part(1).home).write_config(Run(part(0).home).config_path.read_text().replace("part: 0", "part: 1"))
    with pytest.raises(UserError, match=r"of another set: shard-000001, shard-000004, .*run part 1 of 3 again"):
        parts.merge(tmp_path / "run")


def test_jobs_with_and_without_parts_do_not_share_a_run(part, tmp_path):
    do(part(0))
    with pytest.raises(UsageError, match="is written by several parts; `stpredict merge"):
        parts.whole_is_done(part(0, 1))
    prepare(Run(tmp_path / "other"), part(0, 1, run=tmp_path / "other"))
    with pytest.raises(UsageError, match="holds the work of a job without parts"):
        parts.whole_is_done(part(0, run=tmp_path / "other"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not a run directory"):
        parts.whole_is_done(part(0, run=tmp_path / "mine"))


def test_a_part_needs_room_for_its_own_shards_only(part, monkeypatch):
    asked = []
    monkeypatch.setattr(shard, "check_space", lambda folder, needed: asked.append(needed))
    for config in (part(0, 1), part(0), part(1), part(2)):
        shard.plan(config)
    assert asked[0] == sum(asked[1:])
    assert max(asked[1:]) < 0.5 * asked[0]


def test_a_part_beyond_the_last_is_refused(part):
    with pytest.raises(ValueError, match="part is 3: of 3 parts, the last is 2"):
        part(3)


def test_a_pipeline_refuses_parts(tmp_path):
    (tmp_path / "s.yaml").write_text("kind: shard\nsource: {kind: moving_digits}\nparts: 2\n")
    (tmp_path / "p.yaml").write_text("kind: pipeline\nname: p\njobs: {one: {config: s.yaml}}\n")
    with pytest.raises(UsageError, match="`parts` are for jobs submitted by hand"):
        load_pipeline(tmp_path / "p.yaml")


def test_a_pipeline_takes_a_run_that_parts_wrote_as_done(part, few, tmp_path):
    (tmp_path / "s.yaml").write_text(f"kind: shard\nsource: {{kind: folder, path: {few}}}\nmin_samples_per_shard: 1\n")
    (tmp_path / "p.yaml").write_text(f"kind: pipeline\nname: p\nrun: {tmp_path}\njobs: {{run: {{config: s.yaml}}}}\n")
    _, jobs = load_pipeline(tmp_path / "p.yaml")
    assert plan(jobs) == {"run": "run"}
    for number in (0, 1):
        do(part(number, 2))
    parts.merge(tmp_path / "run")
    assert plan(jobs) == {"run": "skip"}


def test_there_must_be_something_to_merge(tmp_path):
    with pytest.raises(UsageError, match="no shards to merge"):
        parts.merge(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_manifest_of_one_set_is_merged_without_a_run(part, tmp_path):
    do(part(0, 1))
    (path := tmp_path / "run" / "train" / "manifest.json").rename(tmp_path / "before")
    parts.merge(path.parent)
    assert path.read_bytes() == (tmp_path / "before").read_bytes()
