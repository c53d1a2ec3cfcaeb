"""A prior sees the same tokens whether they are cached or made on the fly."""

import shutil
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from data_pipeline.errors import UsageError
from data_pipeline.latents import LatentWriter
from data_pipeline.manifest import merge
from data_pipeline.order import Share
from stpredict.exports import load_tokenizer
from stpredict.jobs.config import PriorJobConfig
from stpredict.jobs.train import build_task
from stpredict.priors.task import PriorTask
from stpredict.training.compilation import compile_layers
from tests.stpredict.tokenized import CLIP, GRID, TRAIN, VAL, make_tokenizer

MODEL = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 32, "block": [1, 1, 4], "dropout": 0.0}
SHARE = Share(0, 1, 2)


def task(tokenizer, data) -> PriorTask:
    """As the job builds it; the weights are always the same."""
    config = PriorJobConfig.model_validate(
        {
            "run": "run",
            "data": {"workers": 0, **data},
            "tokenizer": tokenizer,
            "given_frames": 1,
            "model": MODEL,
            "training": {"steps": 1, "batch_size": 2},
        }
    )
    torch.manual_seed(0)
    return build_task(config)


def training_tokens(task: PriorTask, samples: int) -> dict[str, torch.Tensor]:
    with closing(task.training_batches(SHARE, {})) as batches:
        drawn = batches.draw(0, samples // SHARE.batch_size)
    return {key: ids for batch in drawn for key, ids in zip(batch["key"], task.data.tokens(batch), strict=True)}


@pytest.mark.parametrize("start", ["centre", "random"])
def test_tokens_made_on_the_fly_equal_the_cached_ones(encoded, tokenizer, shards, start):
    clip = {**CLIP.model_dump(), "start": start, "flip": True}
    # One virtual stream: the first samples of training are then those of epoch 0, each once.
    cached = task(tokenizer, {"latents": encoded("latents", data={"clip": clip}), "virtual_streams": 1})
    on_the_fly = task(tokenizer, {"kind": "clips", "shards": shards, "clip": clip, "virtual_streams": 1})
    one, other = (training_tokens(t, TRAIN) for t in (cached, on_the_fly))
    assert len(one) == TRAIN
    assert one.keys() == other.keys()
    assert all(ids.dtype == torch.int64 and torch.equal(ids, one[key]) for key, ids in other.items())
    for batch, again in zip(cached.validation_batches(SHARE), on_the_fly.validation_batches(SHARE), strict=True):
        assert (batch["key"], batch["weight"].tolist()) == (again["key"], again["weight"].tolist())
        assert torch.equal(cached.data.tokens(batch), on_the_fly.data.tokens(again))


def test_losses_metrics_and_pictures_are_the_same_and_the_tokenizer_is_not_trained(encoded, tokenizer, shards):
    cached = task(tokenizer, {"latents": encoded("latents")})
    on_the_fly = task(tokenizer, {"kind": "clips", "shards": shards})
    results = []
    for each in (cached, on_the_fly):
        batches = list(each.validation_batches(SHARE))
        assert sum(float(batch["weight"].sum()) for batch in batches) == VAL
        sums = each.training_step(each.model, batches[0])
        sums["cross_entropy"].backward()
        gradients = [parameter.grad for parameter in each.model.parameters()]
        with torch.no_grad():
            validation = [each.validation_step(each.model, batch) for batch in batches]
            picture = each.picture(each.model, batches[0])
        results.append((each.counts(batches[0]), sums, gradients, validation, picture))
    (counts, sums, gradients, validation, picture), (counts_2, sums_2, gradients_2, validation_2, picture_2) = results
    assert counts == counts_2 == dict.fromkeys(("cross_entropy", "accuracy"), 2.0 * (np.prod(GRID) - 4))
    assert all(torch.equal(sums[name], sums_2[name]) for name in sums)
    assert all(torch.equal(*pair) for pair in zip(gradients, gradients_2, strict=True))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(validation, validation_2, strict=True) for name in a)
    np.testing.assert_array_equal(picture, picture_2)
    assert [n for n, _ in cached.model.named_parameters()] == [n for n, _ in on_the_fly.model.named_parameters()]
    assert cached.model.state_dict().keys() == on_the_fly.model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in on_the_fly.tokenizer.model.parameters())
    assert cached.export_config() == on_the_fly.export_config()


def test_compiled_layers_learn_the_same_and_no_picture_is_compiled(encoded, tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor takes a minute
    data, results = {"latents": encoded("latents")}, []
    for compiled in (False, True):
        each = task(tokenizer, data)
        if compiled:
            compile_layers(each.layers())
        batch = next(iter(each.validation_batches(SHARE)))
        loss = each.training_step(each.model, batch)["cross_entropy"]
        loss.backward()
        graphs = counters["stats"]["unique_graphs"]
        with torch.no_grad():
            picture = each.picture(each.model, batch)
        assert counters["stats"]["unique_graphs"] == graphs
        results.append([loss.detach(), *(parameter.grad for parameter in each.model.parameters())])
        results[-1].append(torch.from_numpy(picture))
    assert graphs > 0
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["latents", "clips"])
def test_position_and_quarantine_are_those_of_the_task(kind, encoded, tokenizer, shards):
    data = {"latents": encoded("latents")} if kind == "latents" else {"kind": "clips", "shards": shards}

    def keys(steps, consumed=None, quarantined=()):
        each = task(tokenizer, data | {"max_bad_fraction": 1})
        each.quarantined.update(dict.fromkeys(quarantined, "it hung"))
        with closing(each.training_batches(SHARE, consumed or {})) as batches:
            return [key for step in range(steps) for key in batches.draw(step)[0]["key"]], batches.consumed

    whole, _ = keys(8)
    first, consumed = keys(3)
    assert consumed == {"main": 6}
    assert first + keys(5, consumed)[0] == whole
    assert whole[4] not in keys(8, quarantined=[whole[4]])[0]


def test_the_weight_of_the_main_set_counts(tokenizer, shards):
    mixed = task(tokenizer, {"kind": "clips", "shards": shards, "weight": 1e-9, "mix": {"other": {"shards": shards}}})
    with closing(mixed.training_batches(SHARE, {})) as batches:
        for step in range(12):
            batches.draw(step)
        assert batches.consumed == {"main": 0, "other": 24}


@pytest.mark.parametrize("kind", ["latents", "clips"])
def test_a_missing_validation_split_is_said_at_once(kind, encoded, tokenizer, shards, tmp_path):
    run = shutil.copytree(encoded("latents") if kind == "latents" else shards, tmp_path / "half")
    shutil.rmtree(run / "val")
    with pytest.raises(UsageError, match="half/val: no shard set here"):
        task(tokenizer, {"latents": run} if kind == "latents" else {"kind": "clips", "shards": run})


def test_mixed_clips_may_have_clips_of_their_own_on_the_same_grid(tokenizer, shards):
    other = {"shards": shards, "clip": {**CLIP.model_dump(), "stride": 2}, "weight": 3}
    mixed = task(tokenizer, {"kind": "clips", "shards": shards, "mix": {"slow": other, "same": {"shards": shards}}})
    with closing(mixed.training_batches(SHARE, {})) as batches:
        drawn = [mixed.data.tokens(batches.draw(step)[0]) for step in range(12)]
        assert all(count > 0 for count in batches.consumed.values())
    assert {tuple(ids.shape) for ids in drawn} == {(2, *GRID)}
    other = {"shards": shards, "clip": {**CLIP.model_dump(), "frames": 7}}
    with pytest.raises(UsageError, match=r"data.mix.long.clip: makes a token grid of \(4, 4, 4\), data.clip one of"):
        task(tokenizer, {"kind": "clips", "shards": shards, "mix": {"long": other}})
    other["clip"]["channels"] = 1
    with pytest.raises(UsageError, match=r"data.mix.grey.clip, for .*: clips have 1 channels, the tokenizer takes 3"):
        task(tokenizer, {"kind": "clips", "shards": shards, "mix": {"grey": other}})


def test_latents_that_do_not_belong_to_the_tokenizer_or_together_are_refused(encoded, tokenizer, shards, tmp_path):
    latents, another = encoded("latents"), make_tokenizer(tmp_path / "another", seed=1)
    message = "made by another tokenizer .* encode the clips again with this one"
    with pytest.raises(UsageError, match=f"latents: {message}"):
        task(another, {"latents": latents})
    others = encoded("others", tokenizer=another)
    with pytest.raises(UsageError, match=f"others: {message}"):
        task(tokenizer, {"latents": latents, "mix": {"others": {"latents": others}}})
    mixed = shutil.copytree(latents, tmp_path / "mixed")
    shutil.rmtree(mixed / "val")
    shutil.copytree(others / "val", mixed / "val")
    with pytest.raises(UsageError, match=f"mixed/val: {message}"):
        task(tokenizer, {"latents": mixed})
    long = encoded("long", data={"clip": {**CLIP.model_dump(), "frames": 7}})
    with pytest.raises(UsageError, match=r"long: has a token grid of \(4, 4, 4\), .*latents one of \(3, 4, 4\)"):
        task(tokenizer, {"latents": latents, "mix": {"long": {"latents": long}}})
    with pytest.raises(UsageError, match=r"holds clips, latents are needed; for clips say data.kind=clips"):
        task(tokenizer, {"latents": shards})


def test_a_prior_of_token_ids_refuses_float_latents(tokenizer, tmp_path):
    about = {"grid": GRID, "channels": 2, "fingerprint": load_tokenizer(tokenizer)[2]}
    for split in ("train", "val"):
        with LatentWriter(tmp_path / split, clips=1, shards=1, **about) as writer:
            writer.append([0], np.zeros((1, 2, *GRID), np.float32), ["a"], [0])
        merge(tmp_path / split)
    with pytest.raises(UsageError, match="holds bfloat16 latents, this prior models token ids"):
        task(tokenizer, {"latents": tmp_path})
