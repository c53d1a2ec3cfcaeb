"""What an evaluate job of forecasts says before it has read a whole training split."""

import pytest

from data_pipeline.errors import UsageError
from stpredict.evaluation import climatology
from stpredict.jobs import evaluate
from stpredict.jobs.config import EvaluateConfig
from stpredict.run import Run
from tests.stpredict.evaluation.made_forecasts import field, write_forecasts
from tests.stpredict.forecasters.fields import CHANNELS, SIZE, UNITS


@pytest.fixture
def begun(tmp_path):
    """``begun(index, …)`` evaluates a made-up forecast of ``field_shards``' grid; ``index`` is what differs."""

    def begun(index, size=SIZE, **config):
        about = {"channels": list(CHANNELS), "units": list(UNITS), **index}
        write_forecasts(tmp_path / "forecast", *field(2, *size, channels=2), **about)
        run = Run(tmp_path / "evaluate")
        run.update_status(kind="evaluate")
        evaluate.run(EvaluateConfig(run=run.path, generated=tmp_path / "forecast", **config), run)

    return begun


def test_a_climatology_that_does_not_fit_is_refused_at_its_first_sample(begun, field_shards, monkeypatch):
    read, samples = [], climatology._samples

    def counted(*args):
        for sample in samples(*args):
            read.append(sample)
            yield sample

    monkeypatch.setattr(climatology, "_samples", counted)
    for index, size, message in (
        ({"channels": ["warm", "dry"]}, SIZE, "has the channels warm, damp, the forecasts warm, dry"),
        ({"units": ["degC", "g/kg"]}, SIZE, "is in K, g/kg, the forecasts in degC, g/kg"),
        ({}, (6, 8), r"has frames \(h, w, c\) of \(12, 16, 2\), the forecasts of \(6, 8, 2\)"),
    ):
        read.clear()
        with pytest.raises(UsageError, match=message):
            begun(index, size, climatology=field_shards)
        assert len(read) == 1
    read.clear()
    begun({}, climatology=field_shards)
    assert len(read) == 8


def test_other_mistakes_are_said_before_the_climatology_is_read(begun, field_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "read_climatology", lambda *_: pytest.fail("it is read already"))
    write_forecasts(tmp_path / "other", *field(2, *SIZE, channels=2), keys=["a", "b"])
    for config, message in (
        ({"lpips": {}}, "lpips: of frames of video"),
        ({"others": {"other": tmp_path / "other"}}, "others.other: .* is not of the samples of"),
        ({"quantizer_samples": 1}, r"forecast/config\.yaml"),  # of a forecast whose forecaster is not known
    ):
        with pytest.raises(UsageError, match=message):
            begun({}, climatology=field_shards, **config)
