"""A prior that is told classes, trained on two ranks at every ZeRO stage: its loss is computed inside its forward."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.latents import LatentWriter
from data_pipeline.manifest import merge
from stpredict.exports import load_tokenizer
from stpredict.jobs.config import PriorJobConfig
from stpredict.jobs.train import build_task
from stpredict.run import Run
from tests.distributed import tokenizer_trainings
from tests.distributed.test_engine import assert_same_bits, whole_state
from tests.distributed.toy import run_ranks
from tests.stpredict.tokenized import GRID, make_tokenizer

STEPS, CODES, CLASSES = 6, 256, ("down", "up")
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """With the tokenizer beside them; ids count up or down, by class."""
    folder = tmp_path_factory.mktemp("latents")
    fingerprint = load_tokenizer(make_tokenizer(folder / "tokenizer"))[2]
    rng = np.random.default_rng(0)
    for split, clips in (("train", 32), ("val", 6)):
        labels = np.arange(clips) % 2
        steps = (2 * labels - 1)[:, None] * np.arange(np.prod(GRID))
        ids = (rng.integers(CODES, size=(clips, 1)) + steps) % CODES
        about = {"grid": GRID, "codebook_size": CODES, "fingerprint": fingerprint, "classes": CLASSES}
        with LatentWriter(folder / split, clips=clips, shards=4, **about) as writer:
            keys = [f"{split}{number}" for number in range(clips)]
            writer.append(list(range(clips)), ids.reshape(-1, *GRID), keys, labels.tolist())
        merge(folder / split)
    return folder


def trial(latents: Path, name: str, stage: int, conditioning: dict | None = None, **training) -> dict:
    size = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "block": [2, 1, 4], "dropout": 0.0}
    return {
        "kind": "prior",
        "run": name,
        "tokenizer": str(latents / "tokenizer"),
        "data": {"latents": str(latents), "workers": 0},
        "given_frames": 0,
        "model": {**size, "conditioning": conditioning or {"kind": "class", "dropout": 0.3}},
        "training": {
            "steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "zero_stage": stage,
            "optimizer": {"kind": "adamw", "lr": 1e-2, "eps": 1e-4},
            "log_every": 1,
            "validate_every": 3,
            "picture_every": 3,
            "checkpoint": {"every": STEPS},
            **training,
        },
    }


@pytest.fixture(scope="module")
def runs(latents, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("priors")
    hybrid = {"kind": "class", "start": "hybrid"}
    trials = [trial(latents, f"stage_{stage}", stage) for stage in STAGES]
    trials += [trial(latents, f"bf16_{stage}", stage, precision="bf16") for stage in (0, 3)]
    trials += [trial(latents, "hybrid", 3, hybrid, activation_checkpointing={"policy": "layers"})]
    trials += [{**trial(latents, "resumed", 3), "until": 4}, trial(latents, "resumed", 3)]
    found = run_ranks(trials, out, 2, script=tokenizer_trainings.__file__)
    assert [one["step"] for one in found] == [*[STEPS] * 7, 4, STEPS]
    return out


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_trains_to_the_same_weights(runs):
    first, *others = (whole_state(Run(runs / f"stage_{stage}")) for stage in STAGES)
    for state in others:
        assert state.keys() == first.keys()
        for key, tensor in state.items():
            if key.startswith("model/weight"):
                torch.testing.assert_close(tensor, first[key], rtol=0, atol=2e-5)


def test_the_first_loss_is_that_of_plain_torch(runs, latents):
    config = PriorJobConfig.model_validate({**trial(latents, "plain", 0)})
    torch.manual_seed(config.seed)
    task = build_task(config)
    from data_pipeline.order import Share

    batches = task.training_batches(Share(0, 1, 8), {})
    (batch,) = batches.draw(0, 1)
    batches.close()
    assert (batch["label"] == -1).any()  # dropped
    sequence = task.model.order.to_sequence(batch["latent"])
    logits = task.model(sequence, *task.prefixes.of(batch["label"]))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequence.flatten()).item()
    for stage in STAGES:
        logged = next(row for row in rows(runs / f"stage_{stage}") if "cross_entropy" in row)
        assert logged["cross_entropy"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("run", ["stage_3", "bf16_0", "bf16_3", "hybrid"])
def test_the_loss_falls_in_every_precision_and_with_recomputed_layers(runs, run):
    losses = [row["cross_entropy"] for row in rows(runs / run) if "cross_entropy" in row and "lr" in row]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3


def test_resuming_draws_and_drops_the_same(runs):
    assert_same_bits(whole_state(Run(runs / "resumed")), whole_state(Run(runs / "stage_3")))
