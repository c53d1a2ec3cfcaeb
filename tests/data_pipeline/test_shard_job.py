import os
import socket
import subprocess
import sys

import pytest
from numbered_videos import make_videos

from data_pipeline.errors import UserError
from data_pipeline.manifest import merge, read_manifest
from data_pipeline.verify import verify
from stpredict.jobs import shard
from stpredict.jobs.config import ShardConfig
from stpredict.run import Run
from tests.processes import succeeding

SCRIPT = """
import sys
from stpredict.jobs.config import ShardConfig
from stpredict.jobs.shard import run
from stpredict.run import Run
config = ShardConfig.model_validate_json(sys.argv[1])
run(config, Run(config.home))
"""


def start(config):
    run = Run(config.home)
    run.update_status(kind="shard", state="running")
    return run


def test_a_folder_becomes_two_shard_sets_and_a_rerun_redoes_nothing(tmp_path):
    videos = make_videos(tmp_path / "videos", 20, frames=4)
    config = ShardConfig(run=tmp_path / "run", source={"kind": "folder", "path": videos, "validation_fraction": 0.3})
    shard.run(config, run := start(config))
    train, val = (read_manifest(config.run / split) for split in ("train", "val"))
    assert train.samples + val.samples == 20
    assert train.classes == val.classes == ["class0", "class1", "class2"]
    assert verify(config.run / "train") == verify(config.run / "val") == []
    status = run.status()
    assert (status.step, status.steps, status.unit) == (20, 20, "sample")
    written = sum(path.stat().st_size for path in config.run.glob("*/*.tar"))
    assert 0.5 * written < status.values["MB"] * 1e6 < 1.5 * written  # counted as planned
    before = {path: path.stat().st_mtime_ns for path in config.run.glob("*/shard-*")}
    shard.run(config, run)
    assert {path: path.stat().st_mtime_ns for path in config.run.glob("*/shard-*")} == before


def test_moving_digits_are_rendered_straight_into_the_shards(tmp_path):
    source = {"kind": "moving_digits", "videos": 9, "validation_videos": 4, "frames": 5}
    config = ShardConfig(run=tmp_path / "run", source=source)
    shard.run(config, start(config))
    assert [read_manifest(config.run / split).samples for split in ("train", "val")] == [9, 4]
    assert not list(tmp_path.rglob("*.mp4"))


def test_too_small_a_disk_is_noticed_before_any_shard_is_written(tmp_path, monkeypatch):
    videos = make_videos(tmp_path / "videos", 4, frames=3)
    config = ShardConfig(run=tmp_path / "run", source={"kind": "folder", "path": videos})
    monkeypatch.setattr("data_pipeline.disk.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"needs about .* free at"):
        shard.run(config, start(config))
    assert not list(config.run.rglob("shard-*"))


def test_a_part_of_two_processes_and_a_part_of_one_write_what_one_job_writes(tmp_path):
    videos = make_videos(tmp_path / "videos", 20, frames=4)
    source = {"kind": "folder", "path": videos}
    alone = ShardConfig(run=tmp_path / "alone", source=source)
    shard.run(alone, start(alone))
    shared = {"run": tmp_path / "shared", "source": source, "parts": 2}
    one, two = ShardConfig(**shared, part=0), ShardConfig(**shared, part=1)
    shard.run(one, start(one))
    start(two)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, two.model_dump_json()],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in "01"
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    steps = [Run(config.home).status().step for config in (one, two)]
    assert sum(steps) == 20
    assert min(steps) > 0
    for split in ("train", "val"):
        merge(one.run / split)
        by_one, by_all = ({p.name: p.read_bytes() for p in (c.run / split).iterdir()} for c in (alone, one))
        assert by_one == by_all


def test_planning_and_reading_manifests_need_no_torch():
    modules = "stpredict.jobs.shard, data_pipeline.verify, data_pipeline.latents, data_pipeline.sources.moving_digits"
    check = f"import sys, {modules}; assert not {{'torch', 'webdataset', 'av'}} & set(sys.modules)"
    succeeding([sys.executable, "-c", check])
