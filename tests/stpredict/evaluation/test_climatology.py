"""The climatology against NumPy's grouping of all training frames at once."""

import io
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description, merge
from data_pipeline.tar_shard import TarShard
from stpredict.evaluation.climatology import WINDOW, read_climatology
from stpredict.evaluation.forecast_evaluation import evaluate_forecasts
from stpredict.evaluation.forecasts import Forecasts
from tests.stpredict.evaluation.made_forecasts import field, hourly, index_of

RNG = np.random.default_rng(0)
GRID = (3, 4, 2)


def write_shards(folder: Path, samples: list[tuple[np.ndarray, dict]], **about) -> Path:
    """Two shards of a split train."""
    description = Description(
        **{"kind": "clips", "dtype": "float32", "channels": ["a", "b"], "units": ["K", "K"]} | about
    )
    (folder / "train").mkdir(parents=True)
    for number in range(2):
        tar = TarShard(folder / "train", number, window_bytes=2**12)
        for index, (array, said) in enumerate(samples[number::2]):
            member = io.BytesIO()
            np.save(member, array)
            tar.add(f"key-{number}-{index}", {"npy": member.getvalue()}, {"class": -1, **said})
        tar.finish(description, 2, "plan")
    merge(folder / "train")
    return folder


def recording(steps: int, step_h: float, cut: int, first: datetime = datetime(2019, 12, 30, 5)):
    """Consecutive samples of ``cut`` frames, and all their frames and times."""
    times = [first + timedelta(hours=step_h * number) for number in range(steps)]
    frames = RNG.normal(280, 5, (steps, *GRID)).astype(np.float32)
    cuts = [(frames[k : k + cut], {"time": times[k].isoformat(), "interval_h": step_h}) for k in range(0, steps, cut)]
    return cuts, frames.astype(float), times


def test_within_a_year_it_is_the_mean_by_hour_of_day(tmp_path):
    cuts, frames, times = recording(96, 1.0, 12)
    calls = []
    shards = write_shards(tmp_path, cuts, latitudes=[60.0, 0.0, -60.0])
    found = read_climatology(shards, lambda *done: calls.append(done))
    hours = np.array([time.hour for time in times])
    asked = [datetime(2031, 7, 9, 3), datetime(2031, 7, 9, 4)]  # days are not looked at
    expected = [frames[hours == time.hour].mean(0) for time in asked]
    np.testing.assert_allclose(found.of(asked, 2), expected, rtol=1e-12)
    assert (found.channels, found.units, found.latitudes) == (["a", "b"], ["K", "K"], [60.0, 0.0, -60.0])
    assert found.kind == f"mean of each grid point by hour of day, over 96 frames of {tmp_path / 'train'}"
    assert calls == [(number, 8) for number in range(1, 9)]


def test_over_more_than_a_year_it_is_the_mean_by_hour_over_a_month_around_the_day(tmp_path):
    cuts, frames, times = recording(2 * 420, 12.0, 20)
    found = read_climatology(write_shards(tmp_path, cuts))
    assert f"by hour and day of year, {WINDOW} days around it" in found.kind
    for asked in (datetime(2023, 1, 5, 17), datetime(2024, 2, 29, 5)):  # around the turn of the year, and a leap day
        near = []
        for frame, time in zip(frames, times, strict=True):
            # Days apart in a year of 366, whatever years they are of.
            apart = (datetime(2000, time.month, time.day) - datetime(2000, asked.month, asked.day)).days
            if time.hour == asked.hour and min(apart % 366, -apart % 366) <= WINDOW // 2:
                near.append(frame)
        assert 31 <= len(near) <= 62
        np.testing.assert_allclose(found.of([asked], 1)[0], np.mean(near, axis=0), rtol=1e-12)


def test_without_times_it_is_the_mean_of_all_frames(tmp_path):
    cuts, frames, _ = recording(24, 1.0, 6)
    found = read_climatology(write_shards(tmp_path, [(array, {}) for array, _ in cuts]))
    np.testing.assert_allclose(found.of(None, 3), np.broadcast_to(frames.mean(0), (3, *GRID)), rtol=1e-12)
    assert "by hour" not in found.kind


def test_frames_that_are_not_evenly_apart_have_hours_of_their_own(tmp_path):
    array = np.stack([np.full(GRID, value, np.float32) for value in (1, 2, 3)])
    about = {"time": "2020-01-01T00:00:00", "hours": [0, 6, 25]}
    found = read_climatology(write_shards(tmp_path, [(array, about), (array + 10, about)]))
    asked = [datetime(2020, 1, 1, hour) for hour in (0, 1, 6)]
    assert found.of(asked, 3)[:, 0, 0, 0].tolist() == [6, 8, 7]


def test_samples_of_one_frame_need_no_interval(tmp_path):
    samples = [(np.full((1, *GRID), value, np.float32), {"time": "2020-01-01T05:00:00"}) for value in (1, 3)]
    assert read_climatology(write_shards(tmp_path, samples)).of([datetime(2021, 1, 1, 5)], 1)[0, 0, 0, 0] == 2


def test_times_with_a_zone_are_compared_in_utc(tmp_path):
    cuts, frames, times = recording(48, 1.0, 12)
    for _, about in cuts:
        about["time"] += "+02:00"
    found = read_climatology(write_shards(tmp_path, cuts))
    at = times[20].replace(tzinfo=timezone(timedelta(hours=2)))
    same = frames[[k for k, time in enumerate(times) if time.hour == times[20].hour]].mean(0)
    np.testing.assert_allclose(found.of([at.astimezone(UTC)], 1)[0], same)
    np.testing.assert_allclose(found.of([at], 1)[0], same)


def test_it_is_a_yardstick_with_anomalies_of_the_prediction(tmp_path):
    cuts, _, _ = recording(48, 1.0, 12, datetime(2020, 1, 1))
    shards = write_shards(tmp_path, cuts)
    given, truth, prediction = field(h=3, w=4, channels=2)
    index = index_of(given, truth, **hourly(5), channels=["a", "b"])
    made = Forecasts(index, given, truth, prediction, tmp_path)
    found = read_climatology(shards)
    result, _ = evaluate_forecasts(made, climatology=found)
    expected = np.stack([found.of(index.valid_times(n), 4) for n in range(5)])
    error = np.sqrt(((expected - truth) ** 2).mean())
    assert result.methods["climatology"].metrics["rmse"].overall == pytest.approx(error)
    assert result.climatology == found.kind
    with pytest.raises(UsageError, match="has the channels a, b, the forecasts"):
        found.check(GRID, index_of(given, truth))


def test_hours_that_training_never_saw_are_named(tmp_path):
    cuts, _, _ = recording(16, 6.0, 4)
    found = read_climatology(write_shards(tmp_path, cuts))
    with pytest.raises(UsageError, match=r"train holds nothing of 03:00, which the forecasts are of"):
        found.of([datetime(2020, 1, 1, 3)], 1)


def test_days_that_training_never_saw_are_named(tmp_path):
    winter = [cut for year in (2018, 2020) for cut in recording(8, 6.0, 4, datetime(year, 1, 1))[0]]
    found = read_climatology(write_shards(tmp_path, winter))
    with pytest.raises(UsageError, match="nothing of 06:00 within 15 days of day 183"):
        found.of([datetime(2020, 7, 1, 6)], 1)


def test_a_sample_that_cannot_be_read_is_left_out_and_said(tmp_path, caplog):
    cuts, frames, times = recording(48, 1.0, 12)
    cuts[1][1]["time"] = "yesterday"
    found = read_climatology(write_shards(tmp_path, cuts))
    assert "1 samples of" in caplog.text
    hours = [k for k, time in enumerate(times) if time.hour == 5 and not 12 <= k < 24]
    np.testing.assert_allclose(found.of([datetime(2020, 1, 1, 5)], 1)[0], frames[hours].mean(0))


def test_sets_that_hold_no_fields_or_half_of_the_times_are_refused(tmp_path):
    cuts, _, _ = recording(24, 1.0, 6)
    with pytest.raises(UsageError, match="holds no fields"):
        read_climatology(write_shards(tmp_path / "a", cuts, dtype="uint8"))
    cuts[0][1].pop("time")
    with pytest.raises(UsageError, match="some samples name their time, others do not"):
        read_climatology(write_shards(tmp_path / "b", cuts))
