"""The table of an evaluation against loops over samples, frames and grid points, and what is said of it."""

import csv
import math
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.evaluation import forecast_evaluation
from stpredict.evaluation.climatology import Climatology, _Mean
from stpredict.evaluation.forecast_charts import error_map_chart
from stpredict.evaluation.forecast_evaluation import evaluate_forecasts
from stpredict.evaluation.forecast_means import blocks
from stpredict.evaluation.forecast_scores import as_csv, as_text, read_forecast_metrics
from stpredict.evaluation.forecasts import Forecasts, read_forecasts
from stpredict.evaluation.said import said_of
from stpredict.jobs import evaluate
from stpredict.jobs.config import EvaluateConfig
from stpredict.losses.config import LpipsConfig
from stpredict.run import Run
from tests.stpredict.evaluation.made_forecasts import field, hourly, index_of, video, write_forecasts

LATITUDES = [49.0, 52.0, 55.0, 58.0, 61.0, 64.0]


def forecasts(made, tmp_path="made up", **index) -> Forecasts:
    given, truth, prediction = made
    return Forecasts(index_of(given, truth, **index), given, truth, prediction, tmp_path)


def by_hour(shape, seed: int = 5) -> Climatology:
    """Something else at every hour."""
    rng = np.random.default_rng(seed)
    means = {(60 * hour, 0): _Mean(280 + rng.normal(0, 3, shape), 1) for hour in range(24)}
    return Climatology("made up", [], means, timed=True, daily=False, frames=24)


def test_every_number_of_a_field_is_that_of_loops():
    made = given, truth, prediction = field(n=4, channels=2)
    units, scale, offset = ["K", "K"], [2.0, 5.0], [280.0, 270.0]
    found = forecasts(made, units=units, scale=scale, offset=offset, latitudes=LATITUDES, **hourly(4))
    usual = by_hour((6, 8, 2))
    result, maps = evaluate_forecasts(found, climatology=usual)
    climate = np.array([usual.of(found.index.valid_times(n), 4) for n in range(4)])
    methods = {
        "prediction": prediction,
        "persistence": np.repeat(given[:, -1:], 4, axis=1),
        "climatology": climate,
    }
    assert list(result.methods) == list(methods)
    for name, values in methods.items():
        errors = values.astype(float) - truth
        scaled = errors / np.array(scale)
        check(result.methods[name].metrics, "frame_mse", [(scaled[:, k] ** 2).sum((1, 2, 3)).mean() for k in range(4)])
        check(result.methods[name].metrics, "frame_mae", [np.abs(scaled[:, k]).sum((1, 2, 3)).mean() for k in range(4)])
        check(result.methods[name].metrics, "mse", [(errors[:, k] ** 2).mean() for k in range(4)])
        check(result.methods[name].metrics, "mae", [np.abs(errors[:, k]).mean() for k in range(4)])
        roots = [math.sqrt((errors[:, k] ** 2).mean()) for k in range(4)]
        check(result.methods[name].metrics, "rmse", roots, math.sqrt((errors**2).mean()))
        assert "latitude_rmse" not in result.methods[name].metrics  # of one channel only
        for c, channel in enumerate(found.index.channels):
            of_channel(result.methods[name].channels[channel], values[..., c], truth[..., c], climate[..., c])
    np.testing.assert_allclose(maps.bias, (prediction.astype(float) - truth).mean((0, 1)))
    np.testing.assert_allclose(maps.rmse, np.sqrt(((prediction.astype(float) - truth) ** 2).mean((0, 1))))


def of_channel(metrics, prediction, truth, climate) -> None:
    """``(n, t, h, w)``, frame by frame."""
    cosines = [math.cos(math.radians(latitude)) for latitude in LATITUDES]
    weights = [cosine / (sum(cosines) / 6) for cosine in cosines]
    n, t, h, w = truth.shape
    squares, sums, flat = np.zeros((n, t)), np.zeros((3, n, t)), np.zeros((3, n, t))
    for i, k, y, x in np.ndindex(n, t, h, w):
        p, o = float(prediction[i, k, y, x]), float(truth[i, k, y, x])
        squares[i, k] += weights[y] * (p - o) ** 2 / (h * w)
        a, b = p - climate[i, k, y, x], o - climate[i, k, y, x]
        flat[:, i, k] += a * b, a * a, b * b
        sums[:, i, k] += weights[y] * a * b, weights[y] * a * a, weights[y] * b * b
    check(metrics, "latitude_rmse", np.sqrt(squares).mean(0))
    check(metrics, "latitude_rmse_pooled", np.sqrt(squares.mean(0)), math.sqrt(squares.mean()))
    if not sums[1].any():  # the climatology itself has no anomalies
        assert metrics["acc"].overall is metrics["latitude_acc"].overall is None
        assert metrics["latitude_acc_pooled"].per_lead == [None] * t
        return
    check(metrics, "acc", (flat[0] / np.sqrt(flat[1] * flat[2])).mean(0))
    check(metrics, "latitude_acc", (sums[0] / np.sqrt(sums[1] * sums[2])).mean(0))
    pooled = sums.sum(1)
    whole = sums.sum((1, 2))
    check(
        metrics,
        "latitude_acc_pooled",
        pooled[0] / np.sqrt(pooled[1] * pooled[2]),
        whole[0] / math.sqrt(whole[1] * whole[2]),
    )


def check(metrics, name: str, per_lead, overall: float | None = None) -> None:
    np.testing.assert_allclose(metrics[name].per_lead, per_lead, rtol=1e-9)
    expected = np.mean(per_lead) if overall is None else overall
    assert metrics[name].overall == pytest.approx(expected, rel=1e-9)


def test_frames_are_measured_in_the_unit_interval_whatever_the_model_saw():
    made = video(channels=3)
    truth, prediction = made[1:]
    result, _ = evaluate_forecasts(forecasts(made, scale=[60.0] * 3, offset=[100.0] * 3))
    errors = (prediction.astype(float) - truth) / 255
    metrics = result.methods["prediction"].metrics
    check(metrics, "frame_mse", (errors**2).sum((2, 3, 4)).mean(0))  # unclipped
    check(metrics, "frame_mae", np.abs(errors).sum((2, 3, 4)).mean(0))
    clipped = prediction.clip(0, 255).astype(float) / 255
    mse = ((clipped - truth / 255) ** 2).mean((2, 3, 4))
    check(metrics, "psnr", (-10 * np.log10(mse)).mean(0))
    assert metrics["rmse"].overall == pytest.approx(255 * math.sqrt((errors**2).mean()))  # in grey levels
    assert {"ssim", "ssim_range_2", "psnr_wrapped"} <= metrics.keys()
    assert result.headline == "frame_mse"


def test_a_field_within_the_unit_interval_when_scaled_is_an_image_too(monkeypatch):
    """Traffic: published in [-1, 1], measured by the papers in [0, 1]."""
    rng = np.random.default_rng(0)
    given, truth = (rng.uniform(-1, 1, (3, 4, 8, 8, 2)).astype(np.float32) for _ in range(2))
    made = given, truth, truth + rng.normal(0, 0.1, truth.shape).astype(np.float32)
    about = {"offset": [-1.0, -1.0], "scale": [2.0, 2.0], "units": ["", ""]}
    metrics = evaluate_forecasts(forecasts(made, **about))[0].methods["prediction"].metrics
    unit = [(x.astype(float) + 1) / 2 for x in (made[2], truth)]
    check(metrics, "psnr", (-10 * np.log10(((unit[0].clip(0, 1) - unit[1]) ** 2).mean((2, 3, 4)))).mean(0))
    assert "ssim" in metrics
    monkeypatch.setattr(forecast_evaluation, "CHUNK_VALUES", 1)
    for outside in (1.5, -1.5):
        truth[2, 3, 0, 0, 0] = outside  # in the last chunk alone
        result = evaluate_forecasts(forecasts(made, **about))[0]
        assert not {"psnr", "ssim"} & result.methods["prediction"].metrics.keys()
        assert "no image's" in result.notes[0]


@pytest.mark.parametrize(("made", "index"), [(field, {**hourly(5), "latitudes": LATITUDES}), (video, {})])
def test_the_size_of_the_chunks_does_not_change_a_bit(monkeypatch, made, index):
    found, calls = forecasts(made(), **index), []
    usual = by_hour((6, 8, 1)) if index else None
    whole, maps = evaluate_forecasts(found, climatology=usual)
    monkeypatch.setattr(forecast_evaluation, "CHUNK_VALUES", 2 * found.truth[0].size)
    chunked, of_chunks = evaluate_forecasts(found, climatology=usual, report=lambda *done: calls.append(done))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert chunked == whole
    np.testing.assert_allclose(of_chunks.rmse, maps.rmse)


def test_a_prediction_that_is_worse_than_copying_is_said_to_be():
    still = np.repeat(field(n=3)[0][:, -1:], 4, axis=1)
    given = still[:, :3]
    result, _ = evaluate_forecasts(forecasts((given, still + 0.25, still + 1)))
    assert not result.beats_persistence
    assert "do NOT beat persistence: 200.0% worse (RMSE 0.75 K against 0.25 K" in result.verdict()
    better, _ = evaluate_forecasts(forecasts((given, still + 1, still + 0.75)))
    assert better.beats_persistence
    assert better.verdict().startswith("Predictions beat persistence by 75.0% (RMSE 0.25 K against 1 K")


def test_lead_times_at_which_copying_is_better_are_named():
    given = field(n=3)[0]
    still = np.repeat(given[:, -1:], 4, axis=1)
    moving = still + np.arange(4, dtype=np.float32)[:, None, None, None]  # persistence is off by 0, 1, 2, 3 K
    result, _ = evaluate_forecasts(forecasts((given, moving, moving + 1), **hourly(3)))
    assert result.beats_persistence
    assert result.comparisons()[0] == "Persistence is as good or better at +1 h, +2 h."
    assert evaluate_forecasts(forecasts((given, moving, moving + 5)))[0].comparisons() == []


def test_persistence_against_itself_is_no_win():
    given, truth, _ = field()
    result, _ = evaluate_forecasts(forecasts((given, truth, np.repeat(given[:, -1:], 4, axis=1))))
    assert not result.beats_persistence
    assert "do NOT beat" in result.verdict()


def test_differences_are_paired_and_their_errors_those_of_means_over_samples():
    made = given, truth, prediction = field(n=60)
    other = prediction + np.random.default_rng(1).normal(0, 0.3, truth.shape).astype(np.float32)
    result, _ = evaluate_forecasts(forecasts(made), {"noisier": forecasts((given, truth, other))})
    found = {d.metric: d for d in result.differences if d.other == "noisier"}
    gaps = (np.abs(prediction.astype(float) - truth) - np.abs(other.astype(float) - truth)).mean((1, 2, 3, 4))
    assert found["mae"].value == pytest.approx(gaps.mean())
    assert found["mae"].stderr == pytest.approx(gaps.std(ddof=1) / math.sqrt(60))
    squares = [((x.astype(float) - truth) ** 2).mean((1, 2, 3, 4)) for x in (prediction, other)]
    left_out = np.array([np.subtract(*(math.sqrt(np.delete(s, i).mean()) for s in squares)) for i in range(60)])
    jackknife = math.sqrt(59 / 60 * ((left_out - left_out.mean()) ** 2).sum())
    assert found["rmse"].value == pytest.approx(np.subtract(*(math.sqrt(s.mean()) for s in squares)))
    assert found["rmse"].stderr == pytest.approx(jackknife, rel=0.02)
    assert any("better than noisier" in line and "NOT" not in line for line in result.comparisons())
    said = {d.other: f"{d.in_words()} K" for d in result.differences if d.metric == "rmse"}
    assert said["persistence"] in result.verdict()
    assert f"Prediction is better than noisier: RMSE {said['noisier']}." in result.comparisons()
    lines = [d.model_copy(update={"value": value, "stderr": 1.0}) for d in result.differences for value in (1.9, -2.1)]
    assert [line.is_small for line in lines[:2]] == [True, False]
    alone, _ = evaluate_forecasts(forecasts([x[:1] for x in made]))
    assert alone.differences[0].stderr is None


def test_windows_that_overlap_are_not_taken_for_independent():
    given, truth, _ = field(n=28)
    worse = np.repeat([1.0, 2.0, 4.0, 3.0], 7).astype(np.float32)[:, None, None, None, None]  # a window is 7 hours long
    index = {**hourly(28)}
    other = forecasts((given, truth, truth), **index)
    result, _ = evaluate_forecasts(forecasts((given, truth, truth + worse), **index), {"exact": other})
    found = next(d for d in result.differences if (d.other, d.metric) == ("exact", "mae"))
    assert found.stderr == pytest.approx(np.std([1, 2, 4, 3], ddof=1) / 2, rel=1e-4)
    known_apart = {"times": [time + k * timedelta(days=1) for k, time in enumerate(index["times"])], "interval_h": 1}
    apart, _ = evaluate_forecasts(forecasts((given, truth, truth + worse), **known_apart))
    alone, _ = evaluate_forecasts(forecasts((given, truth, truth + worse)))
    assert apart.differences == alone.differences
    short, _ = evaluate_forecasts(forecasts([x[:6] for x in (given, truth, truth + 1)], **hourly(6)))
    assert short.differences[0].stderr is None


def test_a_stretch_is_as_long_as_a_sample_whose_given_frames_are_further_apart_than_the_others():
    """WeatherBench-M as published: frames given from 102 h before the last one on, predicted up to 114 h after it."""
    given, truth, _ = field(n=74)
    index = index_of(given, truth)
    times = [datetime(2017, 1, 1) + k * timedelta(hours=6) for k in range(74)]
    about = {"times": times, "interval_h": 6, "seen_h": 102, "leads_h": [6, 42, 78, 114]}
    found = blocks(index.model_copy(update=about))
    apart = (102 + 114 + 6) // 6  # windows: the first that shares no frame with another one
    assert found.tolist() == [k // apart for k in range(74)]


def test_a_gain_that_may_be_chance_is_said_to_be_small():
    given, truth, _ = field(n=12)
    last = np.repeat(given[:, -1:], 4, axis=1)
    better_or_worse = np.where(np.arange(12) % 2, 0.99, 1.0)[:, None, None, None, None]
    prediction = (truth + (last - truth) * better_or_worse).astype(np.float32)
    sure, _ = evaluate_forecasts(forecasts((given, truth, prediction)))
    assert sure.beats_persistence
    assert "standard errors" not in sure.verdict()
    mixed = np.where(np.arange(12) % 2, 0.9, 1.09)[:, None, None, None, None]
    chance, _ = evaluate_forecasts(forecasts((given, truth, (truth + (last - truth) * mixed).astype(np.float32))))
    assert chance.verdict().endswith(", within two standard errors).")


def test_units_that_differ_are_not_added_up():
    result, _ = evaluate_forecasts(forecasts(field(channels=2), units=["K", "m/s"]))
    assert result.headline == "frame_mse"
    assert not {"rmse", "mse", "mae"} & result.methods["prediction"].metrics.keys()
    assert "rmse" in result.methods["prediction"].channels["channel 1"]
    text = as_text(result)
    assert "RMSE (m/s)" in text
    assert "their units differ" in text


def test_units_that_are_not_known_are_not_taken_for_the_same():
    made = field(channels=2)
    result, _ = evaluate_forecasts(forecasts(made, units=["", ""]))
    assert result.headline == "frame_mse"
    assert not {"rmse", "mse", "mae"} & result.methods["prediction"].metrics.keys()
    assert any("units differ or are not known" in note for note in result.notes)
    assert evaluate_forecasts(forecasts(field(), units=[""]))[0].headline == "rmse"  # of one channel


def test_small_frames_have_no_ssim_and_it_is_said():
    result, _ = evaluate_forecasts(forecasts(tuple(x[:, :, :6] for x in video())))
    assert "ssim" not in result.methods["prediction"].metrics
    assert "7x7" in result.notes[0]


@pytest.mark.parametrize("name", ["given", "truth", "prediction"])
def test_values_that_are_no_numbers_are_named(name, monkeypatch):
    monkeypatch.setattr(forecast_evaluation, "CHUNK_VALUES", 2 * 4 * 6 * 8)  # of two samples: it is in the second
    made = dict(zip(("given", "truth", "prediction"), field(), strict=True))
    made[name][3, -1, 2, 2] = np.nan
    with pytest.raises(UsageError, match=rf"{name}\.npy: 1 values of sample-3 are infinite or not a number"):
        evaluate_forecasts(forecasts(tuple(made.values())))


def test_forecasts_of_other_samples_are_not_put_side_by_side():
    made = given, truth, prediction = field()
    others = {
        "'else' is none of them": forecasts(made, keys=["else", *"bcde"]),
        "they come in another order": forecasts(made, keys=[f"sample-{n}" for n in (1, 0, 2, 3, 4)]),
        "its truth is": forecasts((given, truth[:, :2], prediction[:, :2])),
        "the truth of sample-2 is another": forecasts((given, np.where(np.arange(5) == 2, 0, truth.T).T, prediction)),
    }
    for said, other in others.items():
        with pytest.raises(UsageError, match=f"others.b: .*{said}"):
            evaluate_forecasts(forecasts(made), {"b": other})


def test_a_climatology_of_another_grid_or_without_times_is_refused():
    made = field()
    with pytest.raises(UsageError, match=r"has frames \(h, w, c\) of \(5, 8, 1\)"):
        evaluate_forecasts(forecasts(made, **hourly(5)), climatology=by_hour((5, 8, 1)))
    with pytest.raises(UsageError, match="the forecasts name no times"):
        evaluate_forecasts(forecasts(made), climatology=by_hour((6, 8, 1)))


def test_a_climatology_in_other_units_or_upside_down_is_refused():
    found = forecasts(field(), latitudes=LATITUDES, **hourly(5))
    usual = by_hour((6, 8, 1))
    for about, said in (
        ({"units": ["degC"]}, "made up is in degC, the forecasts in K"),
        ({"latitudes": LATITUDES[::-1]}, "made up has rows at other latitudes than the forecasts"),
    ):
        with pytest.raises(UsageError, match=f"climatology: {said}"):
            evaluate_forecasts(found, climatology=replace(usual, **about))
    evaluate_forecasts(found, climatology=replace(usual, units=["K"], latitudes=LATITUDES))


def test_the_job_writes_its_table_charts_and_maps(tmp_path, caplog):
    about = {**hourly(5), "latitudes": LATITUDES, "channels": ["t2m"], "seconds_per_sample": 0.012}
    write_forecasts(tmp_path / "forecast", *field(), **about)
    twin = field(noise=0.1)
    write_forecasts(tmp_path / "twin", *field()[:2], twin[2], **about)
    run = Run(tmp_path / "evaluate")
    run.update_status(kind="evaluate")
    config = EvaluateConfig(run=run.path, generated=tmp_path / "forecast", others={"twin": tmp_path / "twin"})
    with caplog.at_level("INFO"):
        evaluate.run(config, run)
    result = read_forecast_metrics(run.path / "metrics.json")
    assert (
        result
        == evaluate_forecasts(
            read_forecasts(Run(tmp_path / "forecast")), {"twin": read_forecasts(Run(tmp_path / "twin"))}
        )[0]
    )
    assert result.verdict() in caplog.text
    assert said_of(run.path / "metrics.json") == as_text(result)  # what the command prints
    assert "Prediction is NOT better than twin" in caplog.text
    assert "12" in caplog.text
    for picture in ("lead_times.png", "error_maps.png"):
        assert (run.path / picture).stat().st_size > 1000
    rows = list(csv.DictReader((run.path / "lead_times.csv").open()))
    assert len(rows) == 3 * 4
    assert [row["lead_h"] for row in rows[:4]] == ["1.0", "2.0", "3.0", "4.0"]
    assert float(rows[5]["rmse"]) == result.methods["twin"].metrics["rmse"].per_lead[1]
    assert rows[0]["method"] == "prediction"


def test_maps_of_errors_have_a_row_for_each_channel_and_north_up():
    result, maps = evaluate_forecasts(forecasts(field(channels=2)))
    figure = error_map_chart(result, maps.bias, maps.rmse, "lower")
    images = [axes.images[0] for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for image, values in zip(
        images, (maps.bias[..., 0], maps.rmse[..., 0], maps.bias[..., 1], maps.rmse[..., 1]), strict=True
    ):
        np.testing.assert_array_equal(image.get_array(), values)
        assert image.origin == "lower"
    low, high = images[0].get_clim()
    assert low == -high


def test_the_csv_has_rows_for_all_channels_together_and_each():
    result, _ = evaluate_forecasts(forecasts(field(channels=2)))
    rows = list(csv.DictReader(as_csv(result).splitlines()))
    assert [row["channel"] for row in rows[:12:4]] == ["all", "channel 0", "channel 1"]
    assert rows[0]["lead_h"] == ""
    assert rows[4]["frame_mse"] != ""


@pytest.mark.parametrize(
    ("made", "config", "said"),
    [
        (field, {"lpips": {}}, "lpips: of frames of video"),
        (video, {"climatology": "nowhere"}, "climatology: of fields"),
        (field, {"climatology": "nowhere"}, "nowhere"),
        (field, {"others": {"b": "nowhere"}}, "nowhere/samples/index.json: not there"),
    ],
)
def test_options_that_do_not_fit_the_forecasts_are_refused_in_a_line(tmp_path, made, config, said):
    write_forecasts(tmp_path / "forecast", *made())
    run = Run(tmp_path / "evaluate")
    run.update_status(kind="evaluate")
    with pytest.raises(UsageError, match=said) as error:
        evaluate.run(EvaluateConfig(run=run.path, generated=tmp_path / "forecast", **config), run)
    assert "\n" not in str(error.value)


def test_yardsticks_of_forecasts_are_refused_of_other_runs(tmp_path):
    for config, said in (
        ({"climatology": "x"}, "climatology: of a forecast"),
        ({"others": {"b": "x"}}, "others: of a"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate.run(EvaluateConfig(run=tmp_path, generated=tmp_path / "g", **config), Run(tmp_path))


def test_names_of_yardsticks_are_taken():
    with pytest.raises(ValueError, match="others: persistence is the name of a row"):
        EvaluateConfig(run="x", generated="y", others={"persistence": "z"})


def test_older_configs_of_evaluations_are_what_they_were():
    assert EvaluateConfig(run="x", generated="y").model_dump().keys() == {
        *("run", "seed", "resources", "kind", "generated")
    }


def test_lpips_is_measured_of_the_network_that_is_named(tmp_path):
    from stpredict.losses.alexnet import AlexNet
    from stpredict.losses.perceptual import Lpips

    torch.manual_seed(0)
    torch.save(AlexNet().state_dict(), tmp_path / "alexnet.pth")
    config = LpipsConfig(network="alexnet", trunk=tmp_path / "alexnet.pth")
    made = tuple(x[:2] for x in video(size=32))
    truth, prediction = made[1:]
    metrics = evaluate_forecasts(forecasts(made), lpips=config)[0].methods["prediction"].metrics
    videos = [torch.from_numpy(x.clip(0, 255) / 127.5 - 1).float().movedim(-1, 1) for x in (prediction, truth)]
    expected = Lpips(config)(*videos).mean(0).tolist()
    assert metrics["lpips_alexnet"].per_lead == pytest.approx(expected, rel=1e-5)
    assert "lpips_vgg16" not in metrics
