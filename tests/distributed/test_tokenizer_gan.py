"""A tokenizer trained by all of its losses, against its discriminator, on two ranks, at every ZeRO stage."""

from pathlib import Path

import pytest

from launcher.jobs import load_job
from stpredict.run import Run
from tests.distributed import tokenizer_trainings
from tests.distributed.test_engine import assert_same_bits, whole_state
from tests.distributed.toy import repeatable, run_ranks
from tests.stpredict.tokenized import make_shards

STEPS, START = 6, 2
STAGES = (0, 1, 2, 3)
GAN = {
    "weight": 0.1,
    "lecam": 0.01,
    "r1": 0.02,
    "r1_every": 2,
    "discriminator": {"channels": 8, "layers": 2, "groups": 4},
}
TWINS = ("nbp_k600_tiny", "nbp_ucf101_tiny")
TERMS = {"l1", "perceptual", "adversarial", "real", "fake", "lecam_real", "lecam_fake", "logit_real", "logit_fake"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("clips"))


def trial(clips: Path, name: str, stage: int, **training) -> dict:
    return {
        "run": name,
        "data": {"shards": str(clips), "workers": 0, "clip": {"frames": 5, "size": [16, 16], "short_side": 16}},
        "model": {
            "patch": 1,
            "channels": [8, 16],
            "blocks": [0, 1],
            "strides": [[2, 2, 2]],
            "middle_blocks": 0,
            "groups": 4,
            "levels": [4, 4, 4],
        },
        "loss": {
            "l1": 1.0,
            "perceptual": {"network": {"kind": "random_features", "channels": [8, 16]}},
            "adversarial": GAN,
        },
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "micro_batch_size": 1,
            "precision": "fp32",
            "zero_stage": stage,
            "optimizer": {"kind": "adam", "lr": 1e-3, "eps": 1e-4},
            "discriminator": {
                "optimizer": {"kind": "adam", "lr": 5e-3, "betas": [0.5, 0.9], "eps": 1e-4},
                "start": START,
            },
            "log_every": 1,
            "validate_every": 3,
            "picture_every": 3,
            "checkpoint": {"every": STEPS},
            **training,
        },
    }


def adaptive(**training) -> dict:
    return {"discriminator": {"start": START, "adaptive_weight": True}, **training}


def twin(clips: Path, name: str) -> dict:
    """Of a published config."""
    config = load_job(Path("configs/tokenizers") / f"{name}.yaml", [f"data.shards={clips}", "data.workers=0"], "train")
    return config.model_dump(mode="json", exclude_unset=True) | {"run": name}


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gan")
    trials = [trial(clips, f"stage_{stage}", stage) for stage in STAGES]
    trials += [trial(clips, f"adaptive_{stage}", stage, **adaptive()) for stage in (1, 3)]
    trials += [trial(clips, "bf16", 2, precision="bf16")]
    trials += [{**trial(clips, "resumed", 3), "until": 4}, trial(clips, "resumed", 3)]
    trials += [twin(clips, name) for name in TWINS]
    found = run_ranks(trials, out, 2, script=tokenizer_trainings.__file__)
    assert [one["step"] for one in found] == [STEPS] * 7 + [4, STEPS] + [STEPS] * len(TWINS)
    return out


def rows(run: Path, split: str = "train") -> list[dict]:
    return [row for row in Run(run).metrics() if row["split"] == split]


def test_both_sides_learn_and_every_term_is_logged_from_the_start_on(runs):
    for row in rows(runs / "stage_2"):
        judged = row["step"] > START
        assert (row.keys() >= TERMS) == judged
        assert ("r1" in row) == (judged and (row["step"] - START) % 2 == 1)
        assert ("discriminator_lr" in row) == judged
    first, *_, last = (row for row in rows(runs / "stage_2") if "real" in row)
    assert last["real"] + last["fake"] < first["real"] + first["fake"]  # it tells them apart better
    assert {"psnr", "ssim", "random_features", "codebook_entropy_bits"} <= rows(runs / "stage_2", "val")[-1].keys()


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3"])
def test_all_stages_train_the_same_model_and_discriminator(runs, name):
    expected, found = whole_state(Run(runs / "stage_0")), whole_state(Run(runs / name))
    assert any(key.startswith("discriminator/exp_avg/network.") for key in found)
    assert found["discriminator/buffer/lecam.total"] > 0
    for key in expected:
        if "/weight/" in key:
            assert (found[key] - expected[key]).abs().max() < 2e-5, key


def test_the_adaptive_weight_takes_the_decoders_last_layer(runs):
    for one, other in zip(rows(runs / "adaptive_1"), rows(runs / "adaptive_3"), strict=True):
        assert ("adaptive_weight" in one) == (one["step"] > START)
        if "adaptive_weight" in one:
            assert one["adaptive_weight"] == pytest.approx(other["adaptive_weight"], rel=1e-3)
            assert 0 < one["adaptive_weight"] < 1e4


def test_in_bf16_the_losses_are_those_of_fp32_but_for_its_rounding(runs):
    for low, full in zip(rows(runs / "bf16"), rows(runs / "stage_2"), strict=True):
        assert low["l1"] == pytest.approx(full["l1"], rel=0.02)
        if low["step"] == START + 1:  # after that, what is rounded in the model grows in the discriminator
            for term in TERMS:
                assert low[term] == pytest.approx(full[term], rel=0.05, abs=0.05), term


def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(runs):
    whole, resumed = (Run(runs / name) for name in ("stage_3", "resumed"))
    assert_same_bits(whole_state(whole), whole_state(resumed))
    assert [repeatable(row) for row in whole.metrics()] == [repeatable(row) for row in resumed.metrics()]


@pytest.mark.parametrize("name", TWINS)
def test_the_published_configs_twins_train(runs, name):
    train, validations = rows(runs / name), rows(runs / name, "val")
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert all(row.keys() >= {"perceptual", "adversarial", "real", "fake", "discriminator_lr"} for row in train)
    assert train[-1]["l1"] < train[0]["l1"]
    assert {"psnr", "ssim", "random_features"} <= validations[-1].keys()
