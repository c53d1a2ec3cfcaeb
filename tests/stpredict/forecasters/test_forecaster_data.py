import logging
from contextlib import contextmanager

import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.config import validate
from stpredict.jobs import train
from stpredict.jobs.config import ForecasterJobConfig
from stpredict.run import Run
from tests.stpredict.conftest import OneOf


def job(model: dict, clip: dict | None = None) -> ForecasterJobConfig:
    config = {"run": "unused", "data": {"shards": "nowhere", "clip": clip or {}}, "training": {"steps": 1}}
    config["training"]["batch_size"] = 1
    return validate(ForecasterJobConfig, {**config, "model": {"kind": "simvp", **model}}, "x.yaml")


def test_clips_are_of_the_models_frames_size_and_channels():
    config = job({"size": (8, 12), "channels": 3, "output_frames": 3}, {"stride": 2, "frames": 13, "channels": 3})
    clip = config.data.clips(config.model).clip
    assert (clip.frames, clip.size, clip.channels, clip.stride, clip.resize) == (13, (8, 12), 3, 2, "stretch")


@pytest.mark.parametrize(
    ("name", "value", "right"), [("frames", 5, 20), ("size", (8, 8), r"\(64, 64\)"), ("channels", 3, 1)]
)
def test_clips_of_other_shape_than_the_models_are_refused_in_a_line(name, value, right):
    with pytest.raises(UsageError, match=rf"data\.clip\.{name} .*: {right} by the model; leave it out"):
        job({}, {name: value})


@pytest.mark.parametrize(("size", "said"), [((13, 16), "frames of 13x16 are seen as 16x16"), ((12, 16), None)])
def test_that_frames_are_padded_is_said_once(size, said, monkeypatch, caplog, tmp_path):
    @contextmanager
    def join_ranks():
        yield OneOf(0, 1, torch.device("cpu"), None)

    monkeypatch.setattr(train, "join_ranks", join_ranks)
    with caplog.at_level(logging.WARNING), pytest.raises(UsageError, match="nowhere"):
        train.run(job({"size": size}), Run(tmp_path))
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])
