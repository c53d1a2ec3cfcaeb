"""What a training is said to take in memory and its checkpoints on disk, against one."""

import pytest

from benchmarks.estimates import (
    OFFLOADED,
    SGD,
    WHOLE,
    bucket,
    estimated,
    estimated_checkpoint,
    in_tensors,
    measure,
)


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
    "tokenizer with all losses, ZeRO-2, fp32": trial("adversarial tokenizer", "fp32", 2),
    "tokenizer with all losses, ZeRO-3, fp32": trial("adversarial tokenizer", "fp32", 3),
    "forecaster, ZeRO-0, fp32": trial("forecaster", "fp32", 0),
    "forecaster, ZeRO-3, bf16, layers": trial("forecaster", "bf16", 3, "layers"),
    "forecaster with SVQ, two passes, ZeRO-2, fp32, selective": trial("forecaster_svq", "fp32", 2, "selective"),
}


# Weights, gradients and buckets are nearly all that they take. With the moment at which they take most.
STATES = {
    "ZeRO-0, fp32": ("exchange", trial("weights", "fp32", 0)),
    "ZeRO-1, bf16": ("exchange", trial("weights", "bf16", 1)),
    "ZeRO-1, fp32, one bucket, 2 micro-batches": (
        "backward",
        trial("weights", "fp32", 1, accumulation=2, deepspeed=bucket(WHOLE)),
    ),
    "ZeRO-2, fp32": ("update", trial("weights", "fp32", 2)),
    "ZeRO-2, fp32, one bucket": ("exchange", trial("weights", "fp32", 2, deepspeed=bucket(WHOLE))),
    "ZeRO-2, bf16, one bucket": ("exchange", trial("weights", "bf16", 2, deepspeed=bucket(WHOLE))),
    "ZeRO-2, bf16, three buckets": ("backward", trial("weights", "bf16", 2, deepspeed=bucket(500_000))),
    "ZeRO-3, bf16, one bucket": ("exchange", trial("weights", "bf16", 3, deepspeed=bucket(WHOLE))),
    "ZeRO-2, bf16, summed in bf16": ("update", trial("weights", "bf16", 2, accumulation_dtype="bf16")),
    "ZeRO-0, fp32, SGD": ("exchange", trial("weights", "fp32", 0, optimizer=SGD)),
    "ZeRO-1, bf16, SGD": ("exchange", trial("weights", "bf16", 1, optimizer=SGD)),
    "ZeRO-2, bf16, SGD": ("update", trial("weights", "bf16", 2, optimizer=SGD)),
    "ZeRO-3, bf16, SGD": ("update", trial("weights", "bf16", 3, optimizer=SGD)),
    "ZeRO-1, bf16, offloaded": ("exchange", trial("weights", "bf16", 1, **OFFLOADED)),
    "ZeRO-2, bf16, offloaded": ("backward", trial("weights", "bf16", 2, **OFFLOADED)),
    "ZeRO-2, fp32, offloaded, 2 micro-batches": ("backward", trial("weights", "fp32", 2, accumulation=2, **OFFLOADED)),
    "ZeRO-3, bf16, offloaded": ("backward", trial("weights", "bf16", 3, **OFFLOADED)),
}
ALL = TRIALS | {name: one for name, (_, one) in STATES.items()}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """In two ranks. Bytes of the live tensors of the rank that has most, at the most of a step; and of a checkpoint."""
    return dict(zip(ALL, measure(list(ALL.values()), 2), strict=True))


@pytest.mark.parametrize("name", TRIALS)
def test_memory_is_within_15_percent_of_what_tensors_take(measured, name):
    assert estimated(TRIALS[name], 2).total == pytest.approx(measured[name]["memory"], rel=0.15)


@pytest.mark.parametrize("name", STATES)
def test_what_is_no_activation_is_within_4_percent(measured, name):
    moment, one = STATES[name]
    found = estimated(one, 2)
    assert found.moment == moment
    assert in_tensors(one, found, cuda=False) == pytest.approx(measured[name]["memory"], rel=0.04)


@pytest.mark.parametrize("name", TRIALS)
def test_a_checkpoint_is_as_large_as_one_that_is_written(measured, name):
    assert estimated_checkpoint(TRIALS[name], 2) == pytest.approx(measured[name]["checkpoint"], rel=0.001)
