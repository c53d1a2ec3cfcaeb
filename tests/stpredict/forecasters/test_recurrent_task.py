"""What a recurrent forecaster is trained on, and which true frames it sees."""

import math

import numpy as np
import pytest
import torch

from data_pipeline.order import Share
from stpredict.forecasters.build_task import build_forecaster_task
from stpredict.forecasters.config import (
    ConvLstmConfig,
    ForecasterDataConfig,
    ForecasterLossConfig,
    PredRnnConfig,
    ScheduledSamplingConfig,
    SimVPConfig,
)
from stpredict.forecasters.recurrent_task import RecurrentTask
from stpredict.forecasters.scaling import read_scalings
from stpredict.forecasters.scheduled_sampling import WithShownFrames
from stpredict.forecasters.task import ForecasterTask
from tests.stpredict.forecasters.fields import SIZE, STEPS, moving_field

MODEL = {
    **{"channels": 2, "input_frames": 2, "output_frames": 4, "size": SIZE},
    **{"hidden": (4, 4), "kernel": 3, "patch": 4},
}


def make_task(shards, loss: dict | None = None, **changes) -> ForecasterTask:
    data = ForecasterDataConfig(shards=shards, workers=0)
    torch.manual_seed(0)
    loss = ForecasterLossConfig.model_validate(loss or {})
    model = PredRnnConfig(**MODEL | changes)
    return build_forecaster_task(model, loss, data, read_scalings(data, 2), seed=0)


def batch(count: int = 3) -> dict:
    field = moving_field(STEPS, *SIZE)
    clips = torch.from_numpy(np.stack([field[7 * n : 7 * n + 6] for n in range(count)]))
    shown = torch.arange(3 * count).view(count, 3) % 2 == 0
    return {"clip": clips, "shown": shown, "weight": torch.ones(count), "key": [str(n) for n in range(count)]}


def test_recurrent_forecasters_have_a_task_of_their_own_and_others_not(field_shards):
    data = ForecasterDataConfig(shards=field_shards)
    sizes = {"channels": 2, "input_frames": 2, "output_frames": 4, "size": SIZE}
    for config, kind in (
        (SimVPConfig, ForecasterTask),
        (ConvLstmConfig, RecurrentTask),
        (PredRnnConfig, RecurrentTask),
    ):
        with torch.device("meta"):
            scalings = read_scalings(data, 2)
            task = build_forecaster_task(config(**sizes), ForecasterLossConfig(), data, scalings, 0)
        assert type(task) is kind


def test_the_loss_is_a_mean_over_every_frame_but_the_first(field_shards):
    task, seen = make_task(field_shards, {"mse": 1, "mae": 0.5, "differential_divergence": 0.1}), batch()
    video = task.training_scaling.scaled(seen["clip"])
    with torch.no_grad():
        predicted = task.model(video[:, :, :5], seen["shown"]).frames.double().numpy()
        sums, counts = task.training_step(task.model, seen), task.counts(seen)
    error = predicted - video[:, :, 1:].double().numpy()
    assert error.shape == (3, 2, 5, *SIZE)
    assert float(sums["mse"]) / counts["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert float(sums["mae"]) / counts["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert counts["differential_divergence"] == 3 * 4
    assert math.isfinite(float(sums["differential_divergence"]))


def test_validation_is_of_the_output_frames_from_the_input_frames_alone(field_shards):
    task, seen = make_task(field_shards), batch()
    del seen["shown"]
    with torch.no_grad():
        metrics = task.validation_metrics(task.validation_step(task.model, seen))
    video = task.validation_scaling.scaled(seen["clip"])
    error = (task.model(video[:, :, :2]).frames - video[:, :, 2:]).detach().double().numpy()
    assert metrics["loss"] == pytest.approx((error**2).mean(), rel=1e-4)
    assert metrics["frame_mse"] == pytest.approx((error**2).sum(axis=(1, 3, 4)).mean(), rel=1e-4)
    assert task.picture(task.model, seen).shape[0] == 6


def test_the_share_of_true_frames_falls_as_published():
    """1 less 2e-5 for every step, the first one too; from step 50,000 on, 0."""
    published = ScheduledSamplingConfig()
    eta = 1.0
    for step in range(50_100):
        eta = eta - 0.00002 if step < 50_000 else 0.0
        assert published.share(step) == pytest.approx(max(0.0, eta), abs=1e-6)
    assert published.share(0) == 1 - 2e-5
    assert published.share(24_999) == pytest.approx(0.5)
    assert published.share(50_000) == 0
    steeper = ScheduledSamplingConfig(start=0.5, decrease=0.1, stop=3)
    assert [steeper.share(step) for step in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0, 0])


class Endless:
    """Batches of samples with these keys, whatever is asked for."""

    consumed, replaced = {"main": 5}, 2

    def __init__(self, keys: list[str]):
        self.keys, self.closed = keys, False

    def draw(self, step: int, count: int) -> list[dict]:
        size = len(self.keys) // count
        return [{"key": self.keys[number * size :][:size]} for number in range(count)]

    def close(self) -> None:
        self.closed = True


def shown(keys: list[str], step: int, count: int = 1, seed: int = 0, **sampling) -> torch.Tensor:
    config = PredRnnConfig(**MODEL, scheduled_sampling=sampling)
    batches = WithShownFrames(Endless(keys), config, seed)
    return torch.cat([batch["shown"] for batch in batches.draw(step, count)])


def test_of_many_frames_the_share_is_shown_and_every_frame_of_every_sample_by_itself():
    keys = [f"sample{number}" for number in range(2000)]
    for step, share in ((0, 1.0), (14_999, 0.7), (39_999, 0.2), (50_000, 0.0)):
        found = shown(keys, step)
        assert found.shape == (2000, 3)
        assert found.dtype == torch.bool
        assert found.double().mean(dim=0).numpy() == pytest.approx(share, abs=0.035)  # 3 sd of 2,000 draws at most
    correlations = np.corrcoef(shown(keys, 24_999).double().numpy().T)
    assert np.abs(correlations[np.triu_indices(3, 1)]).max() < 0.07


def test_what_is_shown_depends_on_seed_step_and_key_alone():
    keys = [f"sample{number}" for number in range(24)]
    whole = shown(keys, 24_999)
    for parts in (2, 3):  # ranks that share the batch, and micro-batches
        by_rank = [shown(keys[rank::parts], 24_999) for rank in range(parts)]
        for rank, part in enumerate(by_rank):
            assert torch.equal(part, whole[rank::parts])
        assert torch.equal(shown(keys, 24_999, count=parts), whole)
    assert not torch.equal(shown(keys, 25_000), whole)
    assert not torch.equal(shown(keys, 24_999, seed=1), whole)


def test_the_stream_under_it_is_passed_through():
    stream = Endless(["a", "b"])
    batches = WithShownFrames(stream, PredRnnConfig(**MODEL), 0)
    assert (batches.consumed, batches.replaced) == ({"main": 5}, 2)
    batches.close()
    assert stream.closed


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_batches_hold_the_same_draws_however_ranks_split_them(field_shards, ranks):
    sampling = {"start": 0.5, "decrease": 0.0}

    def drawn(rank: int, size: int) -> dict[str, list[bool]]:
        task = make_task(field_shards, scheduled_sampling=sampling)
        batches = task.training_batches(Share(rank, size, 6 // size), {})
        found = {}
        for step in range(2):
            for batch in batches.draw(step, 1):
                found |= {(step, key): row.tolist() for key, row in zip(batch["key"], batch["shown"], strict=True)}
        batches.close()
        return found

    whole = drawn(0, 1)
    assert len(whole) > 6
    parts = {key: rows for rank in range(ranks) for key, rows in drawn(rank, ranks).items()}
    assert parts == whole
    assert {shown for rows in whole.values() for shown in rows} == {True, False}
