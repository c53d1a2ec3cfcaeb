"""A third split: from a source that has one to whatever reads shard sets."""

import json

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from data_pipeline.shard_set import read_set
from launcher.inspection import describe
from launcher.parts import merge
from stpredict.evaluation.run_facts import read_facts
from stpredict.jobs import shard
from stpredict.jobs.config import ShardConfig
from stpredict.run import Run


def sharded(folder, parts=1, **ranges):
    np.save(folder / "a.npy", np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 4, 4), np.float32))
    source = {"kind": "arrays", "path": folder / "a.npy", "axes": "t h w", "sequence": 4, **ranges}
    for part in range(parts):
        config = ShardConfig(run=folder / "run", source=source, parts=parts, part=part, min_samples_per_shard=1)
        run = Run(config.home)
        run.update_status(kind="shard", state="running")
        shard.run(config, run)
        run.write_config(json.dumps(config.model_dump(mode="json")))
        run.update_status(state="done", started="2026-01-01T00:00:00+00:00", finished="2026-01-01T00:00:01+00:00")
    return folder / "run"


RANGES = {"train": (0, 20), "val": (20, 28), "test": (28, 40)}


@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_written_merged_read_and_told_of_like_the_others(tmp_path, parts):
    run = sharded(tmp_path, parts, **RANGES)
    if parts > 1:
        assert [path.name for path in merge(run)] == ["train", "val", "test"]
    assert {split: read_set(str(run), split).manifest.samples for split in RANGES} == {"train": 5, "val": 2, "test": 3}
    assert [facts["path"] for facts in describe(str(run)) if facts["what"] == "shard set"] == [
        str(run / split) for split in RANGES
    ]
    assert list(read_facts("run", run).manifests) == ["train", "val", "test"]
    assert read_set(str(run), "test").manifest.moments.mean == [pytest.approx(np.arange(28, 40).mean())]


def test_a_set_without_one_is_what_it_was_and_says_so_in_a_line(tmp_path):
    run = sharded(tmp_path, train=(0, 20), val=(20, 40))
    assert not (run / "test").exists()
    with pytest.raises(UsageError, match=r"run/test: no shard set here: .*run has no test split; shard it") as caught:
        read_set(str(run), "test")
    assert "\n" not in str(caught.value)
