import numpy as np
import pytest
import torch

from stpredict.exports import ForecasterExport
from stpredict.forecasters.config import ForecasterDataConfig, ForecasterLossConfig, SimVPConfig
from stpredict.forecasters.scaling import read_scalings
from stpredict.forecasters.simvp import Forecast
from stpredict.forecasters.task import ForecasterTask
from tests.stpredict.forecasters.fields import SIZE, STEPS, moving_field

MODEL = {"channels": 2, "input_frames": 2, "output_frames": 4, "size": SIZE, "hid_S": 4, "hid_T": 8, "N_S": 2, "N_T": 2}


def make_task(shards, loss: dict | None = None, **model) -> ForecasterTask:
    model, data = SimVPConfig(**MODEL | model), ForecasterDataConfig(shards=shards)
    torch.manual_seed(0)
    loss = ForecasterLossConfig.model_validate(loss or {})
    return ForecasterTask(model, loss, data, read_scalings(data, 2), seed=0)


def clips(count: int = 3) -> torch.Tensor:
    field = moving_field(STEPS, *SIZE)
    return torch.from_numpy(np.stack([field[7 * n : 7 * n + 6] for n in range(count)]))


def batch(weight: list[float]) -> dict:
    return {"clip": clips(len(weight)), "weight": torch.tensor(weight), "key": [str(n) for n in range(len(weight))]}


def test_terms_over_their_counts_are_means_of_the_scaled_errors(field_shards):
    task = make_task(field_shards, {"mse": 1, "mae": 0.5, "differential_divergence": 0.1})
    seen = batch([1, 1, 1])
    prediction = task.model(task.training_scaling.scaled(seen["clip"])[:, :, :2]).frames.detach().double().numpy()
    truth = task.training_scaling.scaled(seen["clip"])[:, :, 2:].double().numpy()
    with torch.no_grad():
        sums, counts = task.training_step(task.model, seen), task.counts(seen)
    assert task.weights == {"mse": 1, "mae": 0.5, "differential_divergence": 0.1}
    assert float(sums["mse"]) / counts["mse"] == pytest.approx(((prediction - truth) ** 2).mean(), rel=1e-5)
    assert float(sums["mae"]) / counts["mae"] == pytest.approx(np.abs(prediction - truth).mean(), rel=1e-5)

    def softmax(x):
        e = np.exp(x / 0.1 - (x / 0.1).max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    p, q = (softmax(np.diff(x, axis=2).transpose(0, 2, 1, 3, 4).reshape(3, 3, -1)) for x in (prediction, truth))
    published = (p * np.log(p / (q + 1e-12) + 1e-12)).mean()  # TAU's code takes the mean over everything
    found = float(sums["differential_divergence"]) / counts["differential_divergence"]
    assert found == pytest.approx(published, rel=1e-4)


def test_validation_is_in_physical_units_per_value_and_in_scaled_sums_per_frame_and_leaves_out_what_fills_up(
    field_shards,
):
    task = make_task(field_shards, {"mse": 0, "mae": 1})
    sums = {}
    for part in (batch([1, 1, 0]), batch([1])):
        with torch.no_grad():
            found = task.validation_step(task.model, part)
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value
    metrics = task.validation_metrics(sums)
    assert set(task.metrics) == metrics.keys()
    scaling = task.validation_scaling
    counted = torch.cat([clips(2), clips(1)])
    scaled = scaling.scaled(counted)
    predicted = task.model(scaled[:, :, :2]).frames.detach()
    physical = (scaling.physical(predicted) - counted[:, 2:]).double().numpy()
    assert metrics["physical_mse"] == pytest.approx((physical**2).mean(), rel=1e-4)
    assert metrics["physical_rmse"] == pytest.approx((physical**2).mean() ** 0.5, rel=1e-4)
    assert metrics["physical_mae"] == pytest.approx(np.abs(physical).mean(), rel=1e-4)
    error = (predicted - scaled[:, :, 2:]).double().numpy()
    assert metrics["mse"] == pytest.approx((error**2).mean(), rel=1e-4)
    assert metrics["mae"] == metrics["loss"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert metrics["frame_mse"] == pytest.approx((error**2).sum(axis=(1, 3, 4)).mean(), rel=1e-4)
    assert metrics["frame_mae"] == pytest.approx(np.abs(error).sum(axis=(1, 3, 4)).mean(), rel=1e-4)
    copied = (scaled[:, :, 1:2] - scaled[:, :, 2:]).double().numpy()
    assert metrics["persistence_mse"] == pytest.approx((copied**2).mean(), rel=1e-4)
    assert metrics["persistence_mae"] == pytest.approx(np.abs(copied).mean(), rel=1e-4)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_quantizers_commitment_is_a_term_the_mean_over_clips_and_passes(field_shards, place):
    quantizer = {"kind": "vq", "codebook_size": 16, "place": place}
    task, seen = make_task(field_shards, {"commitment": 0.25}, quantizer=quantizer), batch([1, 1, 1])
    found = []
    task.model.quantizer.register_forward_hook(lambda *call: found.append(float(call[-1][1])))
    with torch.no_grad():
        sums = task.training_step(task.model, seen)
    assert task.weights == {"mse": 1, "commitment": 0.25}
    assert len(set(found)) == 2
    assert min(found) > 0
    assert float(sums["commitment"]) / task.counts(seen)["commitment"] == pytest.approx(np.mean(found))


def test_without_a_quantizer_that_commits_there_is_no_such_term(field_shards):
    for quantizer in (None, {"kind": "svq", "codebook_size": 16}):
        task = make_task(field_shards, {"commitment": 0.25}, quantizer=quantizer)
        assert task.weights == {"mse": 1}
        assert task.training_step(task.model, batch([1])).keys() == {"mse", "mae"}


def test_a_perfect_forecast_has_no_error(field_shards):
    task, seen = make_task(field_shards, {"differential_divergence": 0.1}), batch([1, 1])
    truth = task.training_scaling.scaled(seen["clip"])[:, :, 2:]
    assert all(float(value) == 0 for value in task.training_step(lambda given: Forecast(truth), seen).values())


def test_pictures_show_what_was_given_and_then_truth_beside_prediction(field_shards):
    picture = make_task(field_shards).picture(
        lambda given: Forecast(given[:, :, -1:].repeat(1, 1, 4, 1, 1)), batch([1])
    )
    assert picture.dtype == np.uint8
    assert picture.shape[0] == 6
    height, width = SIZE
    truth, prediction = picture[:, -height:, :width], picture[:, -height:, -width:]
    assert (truth[:2] == prediction[:2]).all()
    assert (truth[2:] != prediction[2:]).any()
    assert (prediction[2:] == prediction[1]).all()


def test_the_export_says_how_values_were_scaled_and_what_they_are(field_shards):
    export = make_task(field_shards).export_config()
    again = ForecasterExport.model_validate(export.model_dump(mode="json"))
    assert (again.channels, again.units) == (["warm", "damp"], ["K", "g/kg"])
    assert again.offset == pytest.approx(moving_field(STEPS, *SIZE)[:48].reshape(-1, 2).mean(0), rel=1e-5)
    assert (again.clip.frames, again.clip.size) == (6, SIZE)
