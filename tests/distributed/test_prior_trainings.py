"""A prior that is told classes, trained on two ranks at every ZeRO stage: its loss is computed inside its forward."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from data_pipeline.latents import LatentWriter
from data_pipeline.manifest import merge
from stpredict.config import as_yaml, load
from stpredict.exports import TokenizerExport, load_tokenizer
from stpredict.jobs.config import PriorJobConfig, TokenizerJobConfig
from stpredict.jobs.train import build_task
from stpredict.run import Run
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from tests.distributed import tokenizer_trainings
from tests.distributed.test_engine import assert_same_bits, whole_state
from tests.distributed.toy import run_ranks
from tests.stpredict.tokenized import GRID, make_tokenizer

ROOT = Path(__file__).parents[2]
STEPS, CODES, CLASSES = 6, 256, ("down", "up")
STAGES = (0, 1, 2, 3)


def write_latents(folder: Path, grid: tuple[int, int, int], codes: int, fingerprint: str) -> None:
    """In train and val: ids that count up or down, by class."""
    rng = np.random.default_rng(0)
    for split, clips in (("train", 32), ("val", 6)):
        labels = np.arange(clips) % 2
        steps = (2 * labels - 1)[:, None] * np.arange(np.prod(grid))
        ids = (rng.integers(codes, size=(clips, 1)) + steps) % codes
        about = {"grid": grid, "codebook_size": codes, "fingerprint": fingerprint, "classes": CLASSES}
        with LatentWriter(folder / split, clips=clips, shards=4, **about) as writer:
            keys = [f"{split}{number}" for number in range(clips)]
            writer.append(list(range(clips)), ids.reshape(-1, *grid), keys, labels.tolist())
        merge(folder / split)


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """With the tokenizer beside them."""
    folder = tmp_path_factory.mktemp("latents")
    fingerprint = load_tokenizer(make_tokenizer(folder / "tokenizer"))[2]
    write_latents(folder, GRID, CODES, fingerprint)
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
def twins(tmp_path_factory) -> list[dict]:
    """The tiny twins of the published priors, on made-up latents of their tokenizers."""
    folder = tmp_path_factory.mktemp("twins")
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "up": 1}, unk_token="[UNK]"))
    text.save(str(folder / "text.json"))
    trials = []
    for data in ("k600", "ucf101"):
        tokenizer = load(TokenizerJobConfig, ROOT / f"configs/tokenizers/nbp_{data}_tiny.yaml", ["data.shards=x"])
        made, grid = folder / f"tokenizer_{data}", (2, 4, 4)
        made.mkdir()
        save_file(CausalCnnTokenizer(tokenizer.model).state_dict(), made / "model.safetensors")
        (made / "config.yaml").write_text(as_yaml(TokenizerExport(clip=tokenizer.data.clip, model=tokenizer.model)))
        write_latents(folder / f"latents_{data}", grid, tokenizer.model.codebook_size, load_tokenizer(made)[2])
        for name in sorted((ROOT / "configs/priors").glob(f"nbp_*_{data}_tiny.yaml")):
            given = [f"tokenizer={made}", f"data.latents={folder}/latents_{data}", "data.workers=0"]
            given += [f"model.conditioning.tokenizer={folder}/text.json"] if data == "ucf101" else []
            trials.append({**load(PriorJobConfig, name, given).model_dump(mode="json"), "run": name.stem})
    return trials


@pytest.fixture(scope="module")
def runs(latents, twins, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("priors")
    hybrid = {"kind": "class", "start": "hybrid"}
    trials = [trial(latents, f"stage_{stage}", stage) for stage in STAGES]
    trials += [trial(latents, f"bf16_{stage}", stage, precision="bf16") for stage in (0, 3)]
    trials += [trial(latents, "hybrid", 3, hybrid, activation_checkpointing={"policy": "layers"})]
    trials += [{**trial(latents, "resumed", 3), "until": 4}, trial(latents, "resumed", 3)]
    found = run_ranks([*trials, *twins], out, 2, script=tokenizer_trainings.__file__)
    assert [one["step"] for one in found] == [*[STEPS] * 7, 4, STEPS, *[8] * 6]
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


@pytest.mark.parametrize("data", ["k600", "ucf101"])
@pytest.mark.parametrize("size", ["xl", "xxl", "3b"])
def test_the_tiny_twins_of_the_published_priors_train(runs, size, data):
    losses = [row["cross_entropy"] for row in rows(runs / f"nbp_{size}_{data}_tiny") if "lr" in row]
    assert losses[-1] < losses[0]


def test_resuming_draws_and_drops_the_same(runs):
    assert_same_bits(whole_state(Run(runs / "resumed")), whole_state(Run(runs / "stage_3")))
