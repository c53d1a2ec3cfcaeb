"""What is read of a trial's run: its schedule, its time, how often it saw its samples."""

import json

import pytest
import yaml

from data_pipeline.manifest import Manifest, Shard
from stpredict.studies.config import TrialConfig
from stpredict.studies.points import read_trial
from tests.stpredict.studies.made_up_study import EVERY, STEPS, write_training


@pytest.fixture
def run(tmp_path):
    return write_training(tmp_path / "run", 100_000)


def read(run, **changes):
    config = yaml.safe_load(run.config_path.read_text())
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value}
    run.write_config(yaml.safe_dump(config))
    return read_trial("t", TrialConfig(at={}, runs={"prior": run.path}))


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"warmup_steps": 7}, 7),
        ({"warmup_ratio": 0.05}, 0.05 * STEPS),
        ({"warmup_steps": None, "warmup_ratio": 0.05}, 0.05 * STEPS),
        ({"warmup_steps": 0, "warmup_ratio": 0.05}, 0),
        ({}, 0),
    ],
)
def test_warm_up_is_steps_or_a_share_of_them(run, schedule, steps):
    found = read(run, training={"schedule": {"kind": "cosine", **schedule}})
    assert (found.schedule, found.warmup_steps) == ("cosine", steps)


def test_the_time_of_a_training_is_that_of_its_steps_over_all_its_starts(run):
    """Each line holds the mean of the steps since the one before; a validation has no time of its own."""
    assert read(run).seconds == STEPS * 0.5
    rows = [{"step": step, "split": "train", "loss": 1, "step_s": took} for step, took in ((10, 2.0), (40, 1.0))]
    rows += [{"step": 50, "split": "val", "cross_entropy": 3.0, "step_s": 99.0}]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(run).seconds == 10 * 2.0 + 30 * 1.0
    run.metrics_path.write_text("")
    assert read(run).seconds is None


@pytest.mark.parametrize(
    ("clip", "epochs"), [({}, 4.0), ({"per_video": None}, 4.0), ({"per_video": 1}, 4.0), ({"per_video": 2}, 2.0)]
)
def test_epochs_count_the_clips_of_a_video(run, tmp_path, clip, epochs):
    assert read(run).epochs is None
    samples = STEPS // EVERY * EVERY * 8 // 4
    (tmp_path / "set" / "train").mkdir(parents=True)
    sizes = {"samples": samples, "window_samples": [samples], "bytes": 9, "window_bytes": [9]}
    manifest = Manifest(kind="clips", samples=samples, shards=[Shard(name="shard-000000", sha256="0", **sizes)])
    (tmp_path / "set" / "train" / "manifest.json").write_text(manifest.model_dump_json(exclude_none=True))
    found = read(run, data={"shards": str(tmp_path / "set"), "clip": clip})
    assert found.problems == []
    assert found.epochs == pytest.approx(epochs)
    assert read(run, data={"shards": "s3://bucket/set"}).epochs is None
