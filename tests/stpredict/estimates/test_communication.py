"""What ranks send each other, against the bytes of DeepSpeed's collectives."""

from pathlib import Path

import pytest
import torch

from launcher.estimates import load_training
from stpredict.estimates.communication import communication
from stpredict.estimates.planned import plan_training
from stpredict.estimates.zero3_gathers import Thresholds, gathered, thresholds
from stpredict.training.config import TrainingConfig
from tests.distributed.toy import run_ranks
from tests.stpredict.estimates import collective_bytes

MODEL = {"layers": 3, "width": 64, "heads": 2, "mlp_width": 192, "block": [1, 1, 4], "dropout": 0.0}
LAYERS = {"policy": "layers"}
# As a large model is to DeepSpeed's defaults: weights are released, and looked for ahead, within a fraction of it.
TIGHT = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 50_000,
    "stage3_prefetch_bucket_size": 10_000,
}
TIGHTEST = {**TIGHT, "stage3_prefetch_bucket_size": 0}
WIDER = {**TIGHT, "stage3_max_reuse_distance": 200_000, "stage3_max_live_parameters": 100_000}


def trial(stage: int, micro_batch: int, precision: str = "bf16", settings: dict | None = None, **training) -> dict:
    fixed = {"steps": 3, "batch_size": 8, "precision": precision, "zero_stage": stage, "micro_batch_size": micro_batch}
    zero = {"deepspeed": {"zero_optimization": settings}} if settings else {}
    return {"model": MODEL, "training": {**fixed, **zero, **training}}


TRIALS = {
    "0, accumulation": trial(0, 1),
    "1": trial(1, 4),
    "1, accumulation": trial(1, 1),
    "1, fp32, reduce": trial(1, 2, "fp32", {"use_multi_rank_bucket_allreduce": False}),
    "1, reduce is not for bf16": trial(1, 2, "bf16", {"use_multi_rank_bucket_allreduce": False}),
    "1, gradients in bf16": trial(1, 2, accumulation_dtype="bf16"),
    "1, offloaded": trial(1, 2, settings={"use_multi_rank_bucket_allreduce": False}, offload={"optimizer": "cpu"}),
    "2, accumulation": trial(2, 1),
    "2, reduce": trial(2, 1, settings={"use_multi_rank_bucket_allreduce": False}),
    "2, fp32, recomputed": trial(2, 2, "fp32", activation_checkpointing=LAYERS),
    "3, accumulation": trial(3, 1),
    "3, offloaded": trial(3, 1, offload={"optimizer": "cpu", "parameters": "cpu"}),
    "3, fp32, all-reduce": trial(3, 2, "fp32", {"reduce_scatter": False}),
    "3, large": trial(3, 4, settings=TIGHT),
    "3, larger still": trial(3, 2, settings=TIGHTEST),
    "3, large, a wider view": trial(3, 2, settings=WIDER),
    "3, larger still, recomputed": trial(3, 2, settings=TIGHTEST, activation_checkpointing=LAYERS),
    "3, large, every other recomputed": trial(3, 2, settings=TIGHT, activation_checkpointing={**LAYERS, "every": 2}),
    "3, large, selective": trial(3, 2, settings=TIGHT, activation_checkpointing={"policy": "selective"}),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Bytes of the tensors of a step's collectives, by kind, in two ranks."""
    out = tmp_path_factory.mktemp("collectives")
    rows = run_ranks(list(TRIALS.values()), out, 2, script=collective_bytes.__file__)
    return dict(zip(TRIALS, rows, strict=True))


@pytest.mark.parametrize("name", TRIALS)
def test_a_step_moves_the_bytes_that_are_estimated(measured, name):
    with torch.device("meta"):
        task = collective_bytes.task_of(MODEL)
    training = TrainingConfig.model_validate(TRIALS[name]["training"])
    recomputing = training.activation_checkpointing
    layers = [] if recomputing.policy == "none" else task.layers()[:: recomputing.every]
    estimated: dict[str, float] = {}
    for collective in communication(task.model, layers, training, training.precision, 2):
        estimated[collective.kind] = estimated.get(collective.kind, 0) + collective.tensor_bytes
    small = 1e-3 * sum(estimated.values())  # the engine's own: counts, loss, norms
    seen = {kind: count for kind, count in measured[name].items() if count > small}
    assert seen == pytest.approx(estimated, rel=0.01)


def test_a_ring_sends_a_tensor_once_and_an_all_reduce_twice():
    with torch.device("meta"):
        task = collective_bytes.task_of(MODEL)
    elements = sum(p.numel() for p in task.model.parameters())
    training = TrainingConfig(steps=1, batch_size=16, zero_stage=1)
    reduced, gathered_again = communication(task.model, [], training, "bf16", 8)
    assert reduced.sent(8) == pytest.approx(2 * 4 * elements * 7 / 8)
    assert gathered_again.sent(8) == pytest.approx(2 * elements * 7 / 8)
    assert communication(task.model, [], training, "bf16", 1) == []


@pytest.mark.parametrize(("size", "times"), [("xl", 1.14), ("xxl", 1.33), ("3b", 1.75)])
def test_a_micro_batch_gathers_the_weights_of_nbp_as_often_as_docs_say(size, times):
    config = load_training(Path(f"configs/priors/nbp_{size}_k600.yaml"))
    task = plan_training(config).task
    elements = sum(p.numel() for p in task.model.parameters())
    for recomputed in ([], task.layers()):
        found = gathered(task.model, recomputed, thresholds(config.training))
        assert round(found.per_micro_batch / elements, 2) == times
        assert found.per_step < 0.001 * elements


def test_gathers_of_a_chain_by_hand():
    """Five layers of 100 weights. Where nothing is kept, each is fetched for the forward and again for the backward
    pass; where there is room for all, once."""
    chain = torch.nn.Sequential(*(torch.nn.Linear(10, 10, bias=False) for _ in range(5)))
    nothing = Thresholds(persistence=0, live=0, reuse_distance=0, prefetch=0)
    assert gathered(chain, [], nothing).per_micro_batch == 1000
    assert gathered(chain, [], nothing).live == 100
    near = nothing._replace(reuse_distance=100)  # the last layer is used again next
    assert gathered(chain, [], near).per_micro_batch == 900
    assert gathered(chain, [], Thresholds(persistence=0)).per_micro_batch == 500
    assert gathered(chain, [], Thresholds()) == (0, 500, 500)  # small ones stay, and are fetched once a step
