"""ConvLSTM and PredRNN trained on a field that moves, by one process and by two, and what they forecast then."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.evaluation.forecasts import read_forecasts
from stpredict.exports import export_checkpoint, load_forecaster
from stpredict.jobs import forecast
from stpredict.jobs.config import ForecastConfig
from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints
from tests.distributed import tokenizer_trainings
from tests.distributed.test_engine import assert_same_bits, last_weights, whole_state
from tests.distributed.toy import run_ranks
from tests.stpredict.conftest import OneOf
from tests.stpredict.forecasters.fields import SIZE, make_field_shards

STEPS, SIZES = 40, (1, 2)
KINDS = ("conv_lstm", "pred_rnn")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_field_shards(tmp_path_factory.mktemp("field"), steps=120)


def trial(shards: Path, kind: str, name: str, steps: int = STEPS, **training) -> dict:
    return {
        "kind": "forecaster",
        "run": name,
        "data": {"shards": str(shards), "workers": 0},
        "model": {
            **{"kind": kind, "channels": 2, "input_frames": 3, "output_frames": 2, "size": SIZE},
            **{"hidden": [8, 8], "kernel": 3, "patch": 4},
            "scheduled_sampling": {"start": 0.75, "decrease": 0.01},
        },
        "training": {
            **{"steps": steps, "batch_size": 4, "precision": "fp32", "zero_stage": 0, "clip_norm": None},
            # eps: where a gradient is rounding alone, Adam would take its sign for a direction.
            **{"optimizer": {"kind": "adam", "lr": 1e-2, "eps": 1e-4}, "schedule": {"kind": "one_cycle"}},
            **{"log_every": 1, "validate_every": 10, "picture_every": steps, "checkpoint": {"every": steps}},
            **training,
        },
    }


@pytest.fixture(scope="module")
def folders(shards, tmp_path_factory) -> dict[int, Path]:
    out = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}
    for size, folder in out.items():
        trials = [trial(shards, kind, kind) for kind in KINDS]
        short = {"kind": "pred_rnn", "steps": 6, "validate_every": 6}
        if size == 2:
            trials += [trial(shards, name="whole", **short), trial(shards, name="stage_3", zero_stage=3, **short)]
            again = {"activation_checkpointing": {"policy": "layers"}, "micro_batch_size": 1}
            trials += [trial(shards, name="recomputed", **again, **short)]
            trials += [{**trial(shards, name="resumed", **short), "until": 4}, trial(shards, name="resumed", **short)]
        found = run_ranks(trials, folder, size, script=tokenizer_trainings.__file__)
        assert [one["step"] for one in found][:2] == [STEPS] * 2
    return out


def values(run: Path, split: str, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if row["split"] == split and name in row]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_learns_to_forecast_a_moving_field(folders, kind):
    losses, validated = (values(folders[1] / kind, split, "loss") for split in ("train", "val"))
    assert losses[0] == pytest.approx(1, abs=0.05)  # it begins at about the mean
    assert losses[-1] < 0.6 * losses[0]
    assert validated[-1] < 0.6 * validated[0]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_see_the_same_frames_and_have_the_losses_of_one(folders, kind):
    for split, metric in (("train", "loss"), ("train", "mae"), ("val", "loss"), ("val", "mse")):
        one, two = (values(folders[size] / kind, split, metric) for size in SIZES)
        assert len(set(one)) == len(one) == (STEPS if split == "train" else STEPS // 10)
        assert two == pytest.approx(one, rel=1e-4), (split, metric)


@pytest.mark.parametrize("name", ["stage_3", "recomputed"])
def test_sharded_and_recomputed_trainings_have_the_same_weights(folders, name):
    expected, found = (last_weights(Run(folders[2] / run)) for run in ("whole", name))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-5, msg=key)


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(folders):
    assert_same_bits(*(whole_state(Run(folders[2] / name)) for name in ("resumed", "whole")))


class Alone(OneOf):
    def gather(self, value):
        return [value]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_is_of_the_input_frames_alone_and_as_long_as_is_asked_for(
    folders, kind, shards, tmp_path, monkeypatch
):
    @contextmanager
    def join_ranks():
        yield Alone(0, 1, torch.device("cpu"), None)

    monkeypatch.setattr(forecast, "join_ranks", join_ranks)
    trained, run = Run(folders[1] / kind), Run(tmp_path / "forecast")
    export_checkpoint(complete_checkpoints(trained.checkpoints)[-1], trained.export)
    run.update_status(kind="forecast")
    data = {"shards": shards, "split": "val", "workers": 0}
    job = ForecastConfig(run=run.path, forecaster=trained.path, data=data, output_frames=3, pictures=0)
    forecast.run(job, run)
    made = read_forecasts(run)
    assert (made.index.forecaster, made.index.forecaster_step) == (kind, STEPS)
    assert made.truth.shape == made.prediction.shape == (len(made.index.keys), 3, *SIZE, 2)
    model, export = load_forecaster(trained.path)
    offset, scale = torch.tensor(export.offset), torch.tensor(export.scale)
    given = (torch.from_numpy(np.array(made.given)) - offset) / scale
    given = given.permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        first = model(given).frames
        model.config = model.config.model_copy(update={"input_frames": 5, "output_frames": 1})
        last = model(torch.cat([given, first], dim=2)).frames  # what it predicted goes in as if it were true
    expected = torch.cat([first, last], dim=2).permute(0, 2, 3, 4, 1) * scale + offset
    np.testing.assert_allclose(made.prediction, expected.numpy(), rtol=1e-5)
    with pytest.raises(UsageError, match=rf"swap\.translator: .* is a {kind}, which has no translator"):
        forecast.run(job.model_copy(update={"swap": {"translator": trained.path}}), run)
