"""Forecasters trained by one process and by two: the same losses and weights, whatever the ZeRO stage, and with
BatchNorm, whose statistics are those of the whole batch."""

import json
from pathlib import Path

import pytest
import torch

from stpredict.exports import load_forecaster
from stpredict.run import Run
from tests.distributed import tokenizer_trainings
from tests.distributed.command import stpredict
from tests.distributed.test_engine import assert_same_bits, last_weights, whole_state
from tests.distributed.toy import run_ranks
from tests.stpredict.forecasters.fields import SIZE, make_field_shards

STEPS, SIZES = 6, (1, 2)
STAGES = (0, 1, 2, 3)
SVQ = {"kind": "svq", "codebook_size": 32, "hidden": 8}
#: gSTA, ConvMixer and MogaNet have BatchNorm.
MODELS = {
    "gsta": {"translator": {"kind": "gsta"}},
    "conv_mixer": {"translator": {"kind": "conv_mixer"}},
    "moganet": {"translator": {"kind": "moganet"}},
    "incepu_rolled_out": {"translator": {"kind": "incepu", "groups": 4}, "output_frames": 4},
    "gsta_drop_path": {"translator": {"kind": "gsta", "drop_path": 0.4}, "output_frames": 3},
    "gsta_svq": {"translator": {"kind": "gsta"}, "quantizer": SVQ},
    "gsta_svq_frozen": {"translator": {"kind": "gsta"}, "quantizer": {**SVQ, "learnable": False}},
    "gsta_vq": {"translator": {"kind": "gsta"}, "quantizer": {"kind": "vq", "codebook_size": 16}},
}


def trial(shards: Path, name: str, model: dict, stage: int = 0, **training) -> dict:
    small = {"channels": 2, "input_frames": 2, "output_frames": 2, "size": SIZE, "hid_S": 4, "hid_T": 16}
    return {
        "kind": "forecaster",
        "run": name,
        "data": {"shards": str(shards), "workers": 0},
        "model": {"kind": "simvp", **small, "N_S": 2, "N_T": 2, **model},
        "loss": {"mse": 1, "mae": 0.5, "differential_divergence": 0.1},
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "micro_batch_size": None,
            "precision": "fp32",
            "zero_stage": stage,
            # eps: where a gradient is rounding alone, Adam would take its sign for a direction.
            "optimizer": {"kind": "adam", "lr": 1e-2, "eps": 1e-3},
            "schedule": {"kind": "one_cycle"},
            "log_every": 1,
            "validate_every": 3,
            "picture_every": STEPS,
            "checkpoint": {"every": STEPS},
            **training,
        },
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    shards = make_field_shards(tmp_path_factory.mktemp("shards"))
    out = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}
    for size, folder in out.items():
        trials = [trial(shards, name, model) for name, model in MODELS.items()]
        trials += [trial(shards, f"stage_{stage}", MODELS["gsta_svq_frozen"], stage) for stage in STAGES]
        again = {"activation_checkpointing": {"policy": "layers"}}
        trials += [trial(shards, "recomputed", MODELS["gsta_drop_path"], **again)]
        trials += [{**trial(shards, "resumed", MODELS["gsta"]), "until": 4}, trial(shards, "resumed", MODELS["gsta"])]
        found = run_ranks(trials, folder, size, script=tokenizer_trainings.__file__)
        assert [one["step"] for one in found] == [STEPS] * (len(trials) - 2) + [4, STEPS]
    return out


def values(run: Path, split: str, *names: str) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows if row["split"] == split and name in row] for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_have_the_losses_and_metrics_of_one(folders, name):
    for split, count in (("train", STEPS), ("val", STEPS // 3)):
        one, two = (values(folders[size] / name, split, "loss", "mse", "mae") for size in SIZES)
        assert len(set(one["loss"])) == count
        for metric, expected in one.items():
            assert two[metric] == pytest.approx(expected, rel=2e-4), (split, metric)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_have_the_weights_and_running_statistics_of_one(folders, name):
    one, two = (whole_state(Run(folders[size] / name)) for size in SIZES)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if key.startswith(("model/weight", "model/buffer")):
            torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=2e-4, msg=key)
    if "gsta" in name:
        assert any("running_var" in key for key in one)


def test_every_stage_trains_to_the_same_weights_and_leaves_a_frozen_codebook_alone(folders):
    first, *others = (last_weights(Run(folders[2] / f"stage_{stage}")) for stage in STAGES)
    for state in others:
        assert state.keys() == first.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, first[key], rtol=0, atol=2e-5, msg=key)
    codebooks = [last_weights(Run(folders[size] / "stage_2"))["quantizer.codes.codebook"] for size in SIZES]
    assert torch.equal(*codebooks)


def test_layers_that_are_computed_again_leave_out_the_same_branches_and_move_their_statistics_once(folders):
    plain, recomputed = (whole_state(Run(folders[2] / name)) for name in ("gsta_drop_path", "recomputed"))
    assert plain.keys() == recomputed.keys()
    for key, tensor in plain.items():
        if key.startswith(("model/weight", "model/buffer")):
            torch.testing.assert_close(recomputed[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.slow  # compilation
def test_compiled_layers_have_the_losses_of_two_ranks_that_compile_none(tmp_path):
    model, shards = MODELS["gsta_drop_path"], make_field_shards(tmp_path / "field")
    compiled = {"compile": True}
    recomputed = {**compiled, "activation_checkpointing": {"policy": "layers"}}
    ways = {"eager": {}, "compiled": compiled, "recomputed": recomputed}
    run_ranks(
        [trial(shards, name, model, **more) for name, more in ways.items()],
        tmp_path,
        2,
        script=tokenizer_trainings.__file__,
    )
    for split in ("train", "val"):
        expected, *others = (values(tmp_path / name, split, "loss")["loss"] for name in ways)
        for losses in others:
            assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(folders, size):
    assert_same_bits(whole_state(Run(folders[size] / "resumed")), whole_state(Run(folders[size] / "gsta")))


def test_the_export_is_of_the_best_checkpoint_where_the_config_says_so(tmp_path):
    shards = make_field_shards(tmp_path / "field")
    model = MODELS["gsta"]
    checkpoint = {"every": 3, "keep": 3, "best": {"metric": "mse", "mode": "max"}}  # the first: it learns
    config = trial(shards, str(tmp_path / "run"), model, export="best", checkpoint=checkpoint)
    path = tmp_path / "forecaster.yaml"
    path.write_text(json.dumps(config))
    done = stpredict("train", path)
    assert done.returncode == 0, done.stderr
    first, last = values(tmp_path / "run", "val", "mse")["mse"]
    assert first > last
    assert load_forecaster(tmp_path / "run")[1].step == 3
    config["training"]["checkpoint"] = {"every": 3}
    path.write_text(json.dumps(config))
    refused = stpredict("train", path, f"run={tmp_path / 'other'}")
    assert refused.returncode == 2
    assert "export is best: say by what, checkpoint.best" in refused.stderr
