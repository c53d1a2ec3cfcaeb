import json
import shutil
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.errors import UsageError
from stpredict.config import as_yaml
from stpredict.evaluation.forecast_evaluation import evaluate_forecasts
from stpredict.evaluation.forecast_scores import as_text, read_forecast_metrics
from stpredict.evaluation.forecasts import read_forecasts
from stpredict.evaluation.quantizer_results import QuantizerAnalysis
from stpredict.exports import ForecasterExport, load_forecaster
from stpredict.forecasters.build import build_forecaster
from stpredict.forecasters.config import SimVPConfig
from stpredict.jobs import evaluate, forecast
from stpredict.jobs.config import EvaluateConfig, ForecastConfig
from stpredict.run import Run
from tests.stpredict.conftest import OneOf
from tests.stpredict.forecasters.fields import SIZE, STEPS, moving_field

MODEL = {"channels": 2, "input_frames": 2, "output_frames": 3, "size": SIZE, "hid_S": 4, "hid_T": 8, "N_S": 2, "N_T": 2}
OFFSET, SCALE = (280.0, 5.0), (7.0, 0.4)
HELD_OUT = moving_field(STEPS, *SIZE)[48:].reshape(2, 6, *SIZE, 2)


class Alone(OneOf):
    def gather(self, value):
        return [value]


def make_forecaster(folder: Path, seed: int = 0, clip: dict | None = None, **changes) -> Path:
    torch.manual_seed(seed)
    config = SimVPConfig(**{**MODEL, **changes})
    clip = {"frames": 5, "size": SIZE, "start": "first", "resize": "stretch", **(clip or {})}
    export = ForecasterExport(
        clip=clip, model=config, channels=["warm", "damp"], units=["K", "g/kg"], offset=OFFSET, scale=SCALE, step=7
    )
    folder.mkdir(parents=True)
    save_file(build_forecaster(config).state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(as_yaml(export))
    return folder


@pytest.fixture
def forecasts(tmp_path, field_shards, monkeypatch):
    """``forecasts(forecaster, …)`` is what a forecast job of that made, done in this process."""

    def forecasts(forecaster: Path, **config):
        @contextmanager
        def join_ranks():
            yield Alone(0, 1, torch.device("cpu"), None)

        monkeypatch.setattr(forecast, "join_ranks", join_ranks)
        run = Run(tmp_path / f"forecast{len(list(tmp_path.iterdir()))}")
        run.update_status(kind="forecast")
        data = {"shards": field_shards, "workers": 0, **config.pop("data", {})}
        job = ForecastConfig(run=run.path, forecaster=forecaster, data=data, pictures=1, **config)
        run.config_path.write_text(as_yaml(job))
        forecast.run(job, run)
        return read_forecasts(run)

    return forecasts


def by_truth(given: np.ndarray) -> np.ndarray:
    """Of each sample its number among the held-out windows."""
    return np.array([int(np.abs(HELD_OUT[:, : given.shape[1]] - one).sum(axis=(1, 2, 3, 4)).argmin()) for one in given])


def test_every_held_out_clip_is_forecast_once_in_physical_units(forecasts, tmp_path):
    where = make_forecaster(tmp_path / "export")
    made = forecasts(where, batch_size=1)
    order = by_truth(made.given)
    assert sorted(order) == [0, 1]
    np.testing.assert_array_equal(made.given, HELD_OUT[order][:, :2])
    np.testing.assert_array_equal(made.truth, HELD_OUT[order][:, 2:5])
    model, _ = load_forecaster(where)
    scaled = (torch.from_numpy(HELD_OUT[order][:, :2]) - torch.tensor(OFFSET)) / torch.tensor(SCALE)
    predicted = model(scaled.permute(0, 4, 1, 2, 3)).frames.permute(0, 2, 3, 4, 1)
    expected = predicted * torch.tensor(SCALE) + torch.tensor(OFFSET)
    np.testing.assert_allclose(made.prediction, expected.numpy(), rtol=1e-6)
    index = made.index
    assert (index.channels, index.units, index.data) == (["warm", "damp"], ["K", "g/kg"], "field")
    assert (index.offset, index.scale) == (list(OFFSET), list(SCALE))
    assert (index.forecaster, index.forecaster_step, len(index.keys)) == ("gsta", 7, 2)
    assert (index.input_frames, index.output_frames) == (2, 3)


def test_the_test_split_comes_first_and_none_is_passed_over_for_its_damage(forecasts, tmp_path, field_shards):
    where = make_forecaster(tmp_path / "export")
    made = forecasts(where)
    assert made.index.split == "val"
    said = as_text(evaluate_forecasts(made)[0])
    assert "means over 2 samples of the split val, 3 frames after 2 given ones" in said
    shards = tmp_path / "with_test"
    shutil.copytree(field_shards, shards)
    shutil.copytree(shards / "train", shards / "test")
    made = forecasts(where, data={"shards": shards})
    assert (made.index.split, len(made.index.keys)) == ("test", 8)
    (shards / "test" / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"test/manifest\.json: not a manifest"):
        forecasts(where, data={"shards": shards})


def test_the_index_says_when_every_frame_is_from_the_minutes_of_the_frames():
    start = 60 * 24 * 365
    published = [start + 60 * hour for hour in (0, 36, 72, 102, 108, 144, 180, 216)]
    found = forecast._times("val", ("a", "b"), (published, [minute + 360 for minute in published]), 4)
    assert found["times"] == [datetime(1971, 1, 5, 12), datetime(1971, 1, 5, 18)]
    assert (found["seen_h"], found["interval_h"], found["leads_h"]) == (102, 6, [6, 42, 78, 114])
    found = forecast._times("val", ("a",), ([start + 30 * frame for frame in range(8)],), 4)
    assert (found["seen_h"], found["interval_h"], found["leads_h"]) == (None, 0.5, None)
    assert found["times"] == [datetime(1971, 1, 1, 2)]
    assert forecast._times("val", ("a", "b"), ([], []), 4) == {}


def test_a_sample_whose_frames_are_otherwise_apart_is_named():
    hourly, later = [60, 120, 180, 240], [600, 661, 720, 780]  # whole minutes are rounded
    message = r"val: the frames of c are at 0, 1, 2, 5 h, those of a at 0, 1, 2, 3 h: lead times are those of all"
    with pytest.raises(UsageError, match=message):
        forecast._times("val", ("a", "b", "c"), (hourly, later, [60, 120, 180, 360]), 2)
    with pytest.raises(UsageError, match="the frames of b are at times that are not known, those of a at 0, 1, 2, 3 h"):
        forecast._times("val", ("a", "b"), (hourly, []), 2)


def test_another_horizon_rolls_out(forecasts, tmp_path):
    where = make_forecaster(tmp_path / "export")
    shorter, longer = forecasts(where), forecasts(where, output_frames=4)
    assert longer.prediction.shape[1] == longer.truth.shape[1] == longer.index.output_frames == 4
    rows = [longer.index.keys.index(key) for key in shorter.index.keys]
    np.testing.assert_array_equal(longer.prediction[rows][:, :2], shorter.prediction[:, :2])
    np.testing.assert_array_equal(longer.truth[rows][:, :3], shorter.truth)


def test_parts_come_from_another_training(forecasts, tmp_path):
    """SimVPv2's figure 11."""
    one, other = make_forecaster(tmp_path / "one", 1), make_forecaster(tmp_path / "other", 2)
    made = forecasts(one, swap={"translator": other})
    model, second = load_forecaster(one)[0], load_forecaster(other)[0]
    model.translator = second.translator
    scaled = (torch.from_numpy(np.array(made.given)) - torch.tensor(OFFSET)) / torch.tensor(SCALE)
    predicted = model(scaled.permute(0, 4, 1, 2, 3)).frames.permute(0, 2, 3, 4, 1)
    expected = (predicted * torch.tensor(SCALE) + torch.tensor(OFFSET)).numpy()
    np.testing.assert_allclose(made.prediction, expected, rtol=1e-6)
    assert np.abs(made.prediction - forecasts(one).prediction).max() > 1e-3
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("- 280.0", "- 281.0"))
    with pytest.raises(UsageError, match=r"swap\.translator: .*other sees other values than .*one: offset \[281\.0, 5"):
        forecasts(one, swap={"translator": other})
    wider = make_forecaster(tmp_path / "wider", hid_T=16)
    with pytest.raises(UsageError, match=r"swap\.translator: .*wider: its translator has other layers than .*one"):
        forecasts(one, swap={"translator": wider})


def test_what_does_not_fit_the_forecaster_is_refused_in_a_line(forecasts, tmp_path, video_shards):
    where = make_forecaster(tmp_path / "export")
    with pytest.raises(UsageError, match=r"data\.clip: 5 frames of 8x8; .*export takes 2 and gives 3 of 12x16"):
        forecasts(where, data={"clip": {"size": (8, 8)}})
    with pytest.raises(UsageError, match=r"val: holds video \(uint8\); .*export was trained on a field"):
        forecasts(where, data={"shards": video_shards})
    with pytest.raises(UsageError, match=r"nowhere: has no split test or val"):
        forecasts(where, data={"shards": "nowhere"})
    config = where / "config.yaml"
    config.write_text(config.read_text().replace("- damp", "- dry"))
    with pytest.raises(UsageError, match=r"holds warm, damp; .*export was trained on warm, dry"):
        forecasts(where)


@pytest.mark.parametrize(("size", "short_side"), [((8, 12), 12), ((9, 12), 12), ((7, 10), 12), ((12, 10), None)])
def test_a_cropped_field_keeps_the_latitudes_of_its_rows(size, short_side, forecasts, tmp_path, field_shards):
    shards, latitudes = tmp_path / "on_a_globe", [60.0 - 5 * row for row in range(SIZE[0])]
    shutil.copytree(field_shards, shards)
    manifest = shards / "val" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"latitudes": latitudes}))
    clip = {"size": size, "resize": "crop", "short_side": short_side}
    made = forecasts(make_forecaster(tmp_path / "export", size=size, clip=clip), data={"shards": shards})
    matching = [
        top
        for top in range(SIZE[0] - size[0] + 1)
        for left in range(SIZE[1] - size[1] + 1)
        if any((made.truth[0] == one[2:5, top : top + size[0], left : left + size[1]]).all() for one in HELD_OUT)
    ]
    assert [latitudes[top : top + size[0]] for top in matching] == [made.index.latitudes]
    run = Run(tmp_path / "evaluation")
    run.update_status(kind="evaluate")
    evaluate.run(EvaluateConfig(run=run.path, generated=made.where.parent), run)
    metrics = read_forecast_metrics(run.path / "metrics.json")
    assert "latitude_rmse" in metrics.methods["prediction"].channels["warm"]


def test_shards_in_other_units_than_those_of_the_training_are_refused(forecasts, tmp_path):
    where = make_forecaster(tmp_path / "export")
    export = load_forecaster(where)[1]
    for units, message in (
        ((), None),
        (("K", ""), None),
        (("K", "kg/kg"), r"shards/val: damp is in g/kg; .*export was trained on it in kg/kg; make shards in kg/kg$"),
    ):
        (where / "config.yaml").write_text(as_yaml(export.model_copy(update={"units": list(units)})))
        if message is None:
            assert forecasts(where).index.units == ["K", "g/kg"]
            continue
        with pytest.raises(UsageError, match=message):
            forecasts(where)


@pytest.mark.parametrize("scaling", [None, {"kind": "unit"}])
def test_a_forecaster_of_video_refuses_fields(scaling, forecasts, tmp_path):
    seen = {"channels": [], "units": [], "offset": (0.0, 0.0), "scale": (255.0, 255.0), "scaling": scaling}
    where = make_forecaster(tmp_path / "export")
    export = ForecasterExport.model_validate(load_forecaster(where)[1].model_dump() | seen)
    (where / "config.yaml").write_text(as_yaml(export))
    with pytest.raises(UsageError, match=r"val: holds a field \(float32\); .*export was trained on video"):
        forecasts(where)


def test_a_forecaster_of_a_field_of_one_channel_refuses_video(forecasts, tmp_path, video_shards):
    where = make_forecaster(tmp_path / "export", channels=1, size=(16, 16), clip={"size": (16, 16), "channels": 1})
    export = load_forecaster(where)[1]
    config = export.model_copy(update={"channels": ["warm"], "units": ["K"], "offset": (280.0,), "scale": (7.0,)})
    (where / "config.yaml").write_text(as_yaml(config))
    with pytest.raises(UsageError, match=r"val: holds video \(uint8\); .*export was trained on a field"):
        forecasts(where, data={"shards": video_shards})


def test_video_is_stored_as_it_is_and_predicted_in_grey_levels(forecasts, tmp_path, video_shards):
    where = make_forecaster(tmp_path / "export", channels=1, size=(16, 16), clip={"size": (16, 16), "channels": 1})
    config = where / "config.yaml"
    text = config.read_text()
    for old, new in (("offset:\n- 280.0\n- 5.0", "offset:\n- 0.0"), ("scale:\n- 7.0\n- 0.4", "scale:\n- 255.0")):
        assert old in text
        text = text.replace(old, new)
    config.write_text(text.replace("channels:\n- warm\n- damp", "channels: []"))
    made = forecasts(where, data={"shards": video_shards})
    assert (made.truth.dtype, made.prediction.dtype, made.index.data) == (np.uint8, np.float32, "frames")
    assert made.index.channels == ["grey"]
    assert json.loads((made.where / "index.json").read_text())["times"] is None


def test_evaluate_says_what_the_quantizer_of_the_forecaster_does(forecasts, tmp_path):
    svq = {"kind": "svq", "codebook_size": 16, "hidden": 8}
    where = make_forecaster(tmp_path / "export", quantizer=svq)
    made, run = forecasts(where), Run(tmp_path / "evaluation")
    assert made.index.forecaster == "gsta + svq"
    run.update_status(kind="evaluate")
    forecast_run = made.where.parent
    evaluate.run(EvaluateConfig(run=run.path, generated=forecast_run, quantizer_samples=2), run)
    found = QuantizerAnalysis.model_validate_json((run.path / "quantizer.json").read_bytes())
    model, _ = load_forecaster(where)
    scaled = (torch.from_numpy(np.array(made.given)) - torch.tensor(OFFSET)) / torch.tensor(SCALE)
    latents, _ = model.latents(scaled.permute(0, 4, 1, 2, 3))
    weights = torch.cat(list(model.quantizer.weights(latents))).double().numpy()
    standard = (weights - weights.mean()) / weights.std()
    assert found.weights.kurtosis == pytest.approx((standard**4).mean() - 3, rel=1e-4)
    active = (np.abs(standard) > 2).sum(0)
    shares = active[active > 0] / active.sum()
    assert found.activity[0].perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    for name in ("quantizer", "feature_maps"):
        assert Image.open(run.path / f"{name}.png").size[0] > 100
    text = (where / "config.yaml").read_text()
    (where / "config.yaml").write_text(text.replace("step: 7", "step: 9"))
    with pytest.raises(
        UsageError, match=r"quantizer_samples: .*export is of step 9, .* when it was of step 7; run the"
    ):
        evaluate.run(EvaluateConfig(run=run.path, generated=forecast_run, quantizer_samples=2), run)
    plain = forecasts(make_forecaster(tmp_path / "plain")).where.parent
    with pytest.raises(UsageError, match=r"quantizer_samples: .*plain has no quantizer; leave it out"):
        evaluate.run(EvaluateConfig(run=run.path, generated=plain, quantizer_samples=2), run)
