import json
from datetime import datetime

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.errors import UsageError
from stpredict.evaluation.forecasts import is_forecast, read_forecasts
from stpredict.run import Run
from tests.stpredict.evaluation.made_forecasts import field, hourly, index_of, video, write_forecasts


@pytest.mark.parametrize("made", [video, field])
def test_what_is_written_is_read_back_and_mapped(tmp_path, made):
    given, truth, prediction = made()
    run = write_forecasts(tmp_path, given, truth, prediction)
    found = read_forecasts(run)
    assert is_forecast(run)
    assert found.index == index_of(given, truth)
    for name, array in {"given": given, "truth": truth, "prediction": prediction}.items():
        assert isinstance(getattr(found, name), np.memmap)
        np.testing.assert_array_equal(getattr(found, name), array)


def test_leads_are_multiples_of_the_interval_unless_they_are_given():
    given, truth, _ = field(n=2)
    assert index_of(given, truth).leads is None
    index = index_of(given, truth, interval_h=6, times=["2020-01-01T12:00", "2020-01-01T18:00"])
    assert index.leads == [6, 12, 18, 24]
    assert index.valid_times(1) == [datetime(2020, 1, day, hour) for day, hour in ((1, 18), (2, 0), (2, 6), (2, 12))]
    uneven = index.model_copy(update={"leads_h": [6, 42, 78, 114]})
    assert uneven.valid_times(0)[1] == datetime(2020, 1, 3, 0)  # 36 hours after the first predicted frame


def test_errors_of_channels_add_up_only_where_their_units_are_the_same():
    given, truth, _ = field(channels=2)
    assert index_of(given, truth).unit == "K"
    assert index_of(given, truth, units=["K", "m/s"]).unit is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": [1.0, 2.0]}, "1 channels"),
        ({"scale": [0.0]}, "above 0"),
        ({"times": ["2020-01-01T12:00"]}, "5 keys, but 1 times"),
        ({"leads_h": [1.0]}, "4 output frames"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(change, said):
    given, truth, _ = field()
    with pytest.raises(ValidationError, match=said):
        index_of(given, truth, **change)


def _drop(run: Run) -> None:
    (run.samples / "prediction.npy").unlink()


def _cut(run: Run) -> None:
    path = run.samples / "truth.npy"
    path.write_bytes(path.read_bytes()[:200])


def _half(run: Run) -> None:
    (run.samples / "index.json").write_text('{"keys": [')


def _fewer(run: Run) -> None:
    np.save(run.samples / "given.npy", field()[0][:3])


def _doubles(run: Run) -> None:
    np.save(run.samples / "prediction.npy", field()[2].astype(float))


def _rows(run: Run) -> None:
    path = run.samples / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latitudes": [50.0, 51.0]}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop, "prediction.npy: not there"),
        (_cut, "truth.npy: damaged"),
        (_half, "index.json: damaged"),
        (_fewer, r"given.npy has shape \(3,"),
        (_doubles, "prediction.npy holds float64"),
        (_rows, "2 latitudes, 6 rows"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, damage, said):
    run = write_forecasts(tmp_path, *field(), **hourly(5))
    damage(run)
    with pytest.raises(UsageError, match=said) as error:
        read_forecasts(run)
    assert "\n" not in str(error.value)
    assert str(run.samples) in str(error.value)


def test_a_run_without_forecasts_says_which_job_makes_them(tmp_path):
    assert not is_forecast(Run(tmp_path))
    with pytest.raises(UsageError, match="finish the forecast job"):
        read_forecasts(Run(tmp_path))
