"""Averages of the weights in two processes: what they are, what validation does with them, and that it leaves the
training as it was; early stopping on what they give."""

from pathlib import Path

import pytest
import torch
import yaml

from stpredict.jobs.export import _best
from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints, folder_of, rating
from tests.distributed.command import stpredict
from tests.distributed.test_engine import assert_same_bits, checkpoint_weights, trial, whole_state
from tests.distributed.toy import ToyModel, run_ranks, stack
from tests.stpredict.tokenized import make_shards

DECAY = 0.8
ENGINES = [("fp32", stage) for stage in (0, 1, 2, 3)] + [("bf16", stage) for stage in (0, 1, 2, 3)]
SETTINGS = {
    "steps": 6,
    "ema_decay": DECAY,
    "validate_every": 2,
    "picture_every": 3,
    "checkpoint": {"every": 1, "keep": 100},
    "optimizer": {"kind": "adamw", "lr": 0.05, "weight_decay": 0.1},
}
VALIDATION = [10_000, 10_001]  # samples of two ranks
#: No improvement is large enough, so that the first validation, of step 2, stays the best.
STOPPING = {"steps": 20, "early_stopping": {"metric": "l2", "mode": "min", "patience": 2, "min_delta": 1000}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    folder, trials = tmp_path_factory.mktemp("averages"), []
    for precision, stage in ENGINES:
        base = {**SETTINGS, "precision": precision, "zero_stage": stage}
        if stage == 3:  # what is gathered for a forward pass is let go again, as large weights are
            base["deepspeed"] = {"zero_optimization": {"param_persistence_threshold": 0}}
        for name, changes in {
            "averages": {},
            "weights": {"validate_with": "weights"},
            "accumulated": {"micro_batch_size": 1},
        }.items():
            settings = {**base, **changes}
            trials.append(trial(f"{name}_{precision}_{stage}", training=settings, rich=True, dropout=0.3))
    stopping = {**SETTINGS, **STOPPING, "zero_stage": 2}
    trials.append(trial("stopped", training=stopping))
    trials.append(trial("resumed", training=stopping, until=5))
    trials.append(trial("resumed", training=stopping))
    trials.append(trial("resumed", training=stopping))
    patient = {**stopping, "early_stopping": {**stopping["early_stopping"], "patience": 4}}
    trials.append(trial("resumed", training=patient))
    results = run_ranks(trials, folder, 2)
    names = [t["run"] for t in trials]
    return folder, {
        f"{name}@{number}": result for number, (name, result) in enumerate(zip(names, results, strict=True))
    }


def named(precision: str, stage: int, kind: str = "averages") -> str:
    return f"{kind}_{precision}_{stage}"


def validated(folder: Path, ema: bool, precision: str, stage: int) -> float:
    """l2 of the whole validation set, by plain PyTorch with what a checkpoint holds."""
    model = ToyModel(0.3, rich=True)
    model.load_state_dict(checkpoint_weights(folder, ema))
    model = model.eval().to(torch.bfloat16 if precision == "bf16" and stage else torch.float32)
    batch = stack(VALIDATION)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and stage == 0):
        error = (model(batch["x"]).float() - batch["y"]) * batch["mask"]
    return float(error.square().sum() / batch["mask"].sum())


@pytest.mark.parametrize("kind", ["averages", "accumulated"])
@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_averages_are_the_closed_form_of_the_weights_of_every_step(runs, precision, stage, kind):
    run = Run(runs[0] / named(precision, stage, kind))
    torch.manual_seed(0)
    begun = ToyModel(0.3, rich=True)
    if precision == "bf16" and stage:  # to which DeepSpeed rounds what it is given
        begun = begun.to(torch.bfloat16)
    averages = {name: tensor.double() for name, tensor in begun.named_parameters() if tensor.requires_grad}
    for step in range(1, 7):
        saved = checkpoint_weights(folder_of(run.checkpoints, step), ema=False)
        averages = {name: DECAY * a + (1 - DECAY) * saved[name].double() for name, a in averages.items()}
    found = checkpoint_weights(folder_of(run.checkpoints, 6), ema=True)
    for name, expected in averages.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
        assert not torch.allclose(found[name], saved[name], rtol=0, atol=1e-4)  # they are not the weights


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_validation_computes_with_the_averages_and_leaves_the_training_as_it_was_to_the_bit(runs, precision, stage):
    averages, weights = (Run(runs[0] / named(precision, stage, kind)) for kind in ("averages", "weights"))
    assert_same_bits(whole_state(averages), whole_state(weights))
    for run, ema in ((averages, True), (weights, False)):
        for row in (row for row in run.metrics() if row["split"] == "val"):
            checkpoint = folder_of(run.checkpoints, row["step"])
            expected, other = (validated(checkpoint, which, precision, stage) for which in (ema, not ema))
            assert row["l2"] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 5e-3)
            assert abs(row["l2"] - other) > 3 * abs(row["l2"] - expected)


def test_the_best_checkpoint_was_rated_by_what_is_exported_of_it(runs):
    run = Run(runs[0] / named("fp32", 3))
    run.write_config(yaml.safe_dump({"training": {"checkpoint": {"best": {"metric": "l2", "mode": "min"}}}}))
    best = _best(run.path)
    assert rating(best, "l2") == min(row["l2"] for row in run.metrics() if row["split"] == "val")
    model = ToyModel(0.3, rich=True)
    model.load_state_dict(checkpoint_weights(best, ema=None))  # as an export without further wishes takes them
    assert rating(best, "l2") == pytest.approx(validated(best, True, "fp32", 3), rel=1e-5)


def test_a_training_that_gets_no_better_ends_well_and_a_resumed_one_at_the_same_step(runs):
    folder, results = runs
    (stopped,) = (result for name, result in results.items() if name.startswith("stopped"))
    resumed = [result for name, result in results.items() if name.startswith("resumed")]
    assert (stopped["step"], [result["step"] for result in resumed]) == (6, [5, 6, 6, 10])
    assert (bool(resumed[0]["stopped"]), stopped["stopped"]) == (True, None)
    last = complete_checkpoints(folder / "stopped" / "checkpoints")[-1]
    assert last == folder_of(last.parent, 6)
    again = folder_of(folder / "resumed" / "checkpoints", 6)
    assert_same_bits(checkpoint_weights(last, ema=True), checkpoint_weights(again, ema=True))
    note = Run(folder / "stopped").status().note
    assert note.startswith("stopped at step 6 of 20: l2 of the last 2 validations: none better than ")
    assert note.endswith(" of step 2 by more than 1000")


def test_a_metric_that_validation_does_not_give_is_refused_before_training_begins(tmp_path):
    for name, training in {
        "checkpoint.best": {"checkpoint": {"every": 3, "best": {"metric": "psnr"}}},
        "early_stopping": {"early_stopping": {"metric": "psnr"}},
    }.items():
        with pytest.raises(AssertionError, match=f"training.{name}.metric 'psnr' is no metric .* there are l2"):
            run_ranks([trial("refused", training=training)], tmp_path, 1)
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_the_command_takes_a_training_that_stopped_early_for_done_and_goes_on_when_forced(tmp_path):
    shards, config = make_shards(tmp_path), tmp_path / "train.yaml"
    stopping = {"metric": "mse", "mode": "min", "patience": 2, "min_delta": 1e9}
    content = {
        "kind": "tokenizer",
        "run": str(tmp_path / "run"),
        "data": {"shards": str(shards), "workers": 0, "clip": {"frames": 5, "size": [32, 32]}},
        "model": {"patch": 8, "channels": [8], "blocks": [0], "strides": [], "middle_blocks": 0, "groups": 4},
        "training": {"steps": 40, "batch_size": 4, "validate_every": 1, "early_stopping": stopping},
    }
    config.write_text(yaml.safe_dump(content))
    done = stpredict("train", config)
    run = Run(tmp_path / "run")
    status = run.status()
    assert (done.returncode, status.state, status.step) == (0, "done", 3), done.stderr
    assert "stopped at step 3 of 40: mse of the last 2 validations" in stpredict("status", run.path).stdout
    assert (run.export / "model.safetensors").is_file()

    again = stpredict("train", config)
    assert (again.returncode, run.status()) == (0, status), again.stderr

    more = "training.early_stopping.patience=4"
    refused = stpredict("train", config, more)
    assert refused.returncode == 2
    assert "training.early_stopping.patience: 2 → 4" in refused.stderr
    forced = stpredict("train", config, more, "--force")
    assert (forced.returncode, run.status().step) == (0, 5), forced.stderr
