import io
import json
import time
from datetime import datetime

import numpy as np
import pytest

from data_pipeline.config import ClipConfig
from data_pipeline.errors import DecodeError
from data_pipeline.formats import Clips
from data_pipeline.manifest import Manifest, Moments

FRAMES = 10
NINE = round((datetime(2019, 3, 1, 9) - datetime(1970, 1, 1)).total_seconds() / 60)


def sample(about: dict, epoch: int = 0, part: int = 0, **clip) -> dict:
    """Of an array whose values are the numbers of its frames."""
    array = np.broadcast_to(np.arange(FRAMES, dtype=np.float32)[:, None, None, None], (FRAMES, 2, 2, 1))
    file = io.BytesIO()
    np.save(file, array)
    moments = Moments(count=1, mean=[0.0], m2=[1.0])
    manifest = Manifest(kind="clips", dtype="float32", samples=1, moments=moments, shards=[])
    members = {"npy": file.getvalue(), "json": json.dumps({"class": -1, **about}).encode()}
    config = ClipConfig(size=(2, 2), resize="stretch", **clip)
    return Clips(config, 0, manifest).sample({"key": "k", "members": members}, epoch, part)


@pytest.mark.parametrize("clip", [{"start": "random"}, {"start": "centre", "per_video": 3}, {"stride": 2}])
def test_each_frame_of_a_clip_has_its_own_time_wherever_the_clip_begins(clip):
    regular = {"time": "2019-03-01T09:00:00", "interval_h": 0.5}
    uneven = {"time": "2019-03-01T09:00:00", "hours": [0, 6, 12, 17, 18, 24, 30, 36, 40, 41]}
    for epoch in range(3):
        for part in range(clip.get("per_video", 1)):
            found = sample(regular, epoch, part, frames=3, **clip)
            numbers = found["clip"][:, 0, 0, 0]
            assert found["minutes"] == [NINE + 30 * number for number in numbers]
            found = sample(uneven, epoch, part, frames=3, **clip)
            assert found["minutes"] == [NINE + 60 * uneven["hours"][int(number)] for number in numbers]


def test_times_do_not_depend_on_where_the_machine_is(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert sample({"time": "2019-03-01T09:00:00", "interval_h": 1}, frames=1, start="first")["minutes"] == [NINE]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_arrays_without_times_have_none():
    assert "minutes" not in sample({}, frames=3)


def test_times_that_are_not_as_we_write_them_are_refused():
    for about in (
        {"time": "noon", "interval_h": 1},
        {"time": "2019-03-01T09:00:00"},
        {"time": "2019-03-01T09:00:00", "interval_h": "1 h"},
        {"time": 9, "interval_h": 1},
        {"time": "2019-03-01T09:00:00", "interval_h": float("inf")},
    ):
        with pytest.raises(DecodeError, match=r"its \.json is not as we write it: its times"):
            sample(about, frames=3)
    with pytest.raises(DecodeError, match="times of 2 of 10 frames"):
        sample({"time": "2019-03-01T09:00:00", "hours": [0, 1]}, frames=3)
