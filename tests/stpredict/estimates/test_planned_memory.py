"""What a training is said to take in memory and its checkpoints on disk, against one."""

import pytest

from benchmarks.estimates import estimated, estimated_checkpoint, measure


def trial(model: str, precision: str, stage: int, policy: str = "none", accumulation: int = 1, **training) -> dict:
    fixed = {"precision": precision, "zero_stage": stage, "activation_checkpointing": {"policy": policy}}
    return {"model": model, "accumulation": accumulation, "training": {**fixed, **training}}


TRIALS = {
    "prior, ZeRO-1, bf16, averages, 2 micro-batches": trial("prior", "bf16", 1, accumulation=2, ema_decay=0.99),
    "prior, ZeRO-3, bf16": trial("prior", "bf16", 3),
    "prior, ZeRO-2, bf16, selective": trial("prior", "bf16", 2, "selective"),
    "prior, ZeRO-0, bf16, layers": trial("prior", "bf16", 0, "layers"),
    "prior, ZeRO-2, fp32, 2 micro-batches": trial("prior", "fp32", 2, accumulation=2),
    "tokenizer, ZeRO-1, fp32": trial("tokenizer", "fp32", 1),
    "tokenizer, ZeRO-3, fp32, layers": trial("tokenizer", "fp32", 3, "layers"),
    "tokenizer, ZeRO-2, bf16": trial("tokenizer", "bf16", 2),
    "tokenizer, ZeRO-0, fp32": trial("tokenizer", "fp32", 0),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """In two ranks. Bytes of the live tensors of the rank that has most, at the most of a step; and of a checkpoint."""
    return dict(zip(TRIALS, measure(list(TRIALS.values()), 2), strict=True))


@pytest.mark.parametrize("name", TRIALS)
def test_memory_is_within_15_percent_of_what_tensors_take(measured, name):
    assert estimated(TRIALS[name], 2).total == pytest.approx(measured[name]["memory"], rel=0.15)


@pytest.mark.parametrize("name", TRIALS)
def test_a_checkpoint_is_as_large_as_one_that_is_written(measured, name):
    assert estimated_checkpoint(TRIALS[name], 2) == pytest.approx(measured[name]["checkpoint"], rel=0.001)
