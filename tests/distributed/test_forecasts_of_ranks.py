"""Forecasts that several ranks make between them."""

import numpy as np

from stpredict.evaluation.forecasts import ARRAYS, read_forecasts
from stpredict.run import Run
from tests.distributed import forecast_jobs
from tests.distributed.toy import run_ranks
from tests.stpredict.forecasters.fields import make_field_shards
from tests.stpredict.jobs.test_forecast_job import make_forecaster


def test_two_ranks_write_the_arrays_and_the_index_of_one(tmp_path):
    """Rows of five samples, which share pages and which two ranks do not share evenly."""
    shards, forecaster = make_field_shards(tmp_path, steps=150), make_forecaster(tmp_path / "forecaster")
    job = {"run": "forecast", "forecaster": str(forecaster), "batch_size": 1, "pictures": 1}
    job["data"] = {"shards": str(shards), "workers": 0}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        assert run_ranks([job], tmp_path / str(ranks), ranks, script=forecast_jobs.__file__) == [{"done": True}]
    one, two = (read_forecasts(Run(tmp_path / str(ranks) / "forecast")) for ranks in (1, 2))
    assert len(one.index.keys) == 5
    timed = {"seconds_per_sample": None}
    assert one.index.model_copy(update=timed) == two.index.model_copy(update=timed)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert np.abs(getattr(one, name)).reshape(5, -1).max(1).min() > 0
