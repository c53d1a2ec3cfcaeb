"""What offloading moves between a GPU and its host, and what the CPUs update, against DeepSpeed's copies counted by
hand."""

import pytest
from torch import nn

from stpredict.estimates.communication import communication
from stpredict.estimates.offloading import UPDATED_PER_S, transfers, update_s
from stpredict.training.config import TrainingConfig

WEIGHTS = 1600  # of 4 ranks, 400 each
OPTIMIZER, PARAMETERS = {"optimizer": "cpu"}, {"parameters": "cpu"}
OVERLAP = {"deepspeed": {"zero_optimization": {"overlap_comm": True}}}
NO_OVERLAP = {"deepspeed": {"zero_optimization": {"overlap_comm": False}}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    frozen = nn.Linear(10, 10, bias=False).requires_grad_(False)
    return nn.Sequential(nn.Linear(40, 40, bias=False), frozen)


def training(stage: int, micro_batches: int, offload: dict, **more) -> TrainingConfig:
    sizes = {"batch_size": 4 * 6, "micro_batch_size": 6 // micro_batches}
    return TrainingConfig(steps=1, zero_stage=stage, offload=offload, **sizes, **more)


@pytest.mark.parametrize(
    ("stage", "micro_batches", "precision", "accumulation", "gradients", "weights"),
    [
        (1, 1, "bf16", "fp32", 4, 2),
        (2, 3, "bf16", "fp32", 4, 2),  # sums stay on the GPU, and are copied once
        (2, 3, "fp32", "fp32", 4 + 4 * 5, 4),  # to the host, and twice to the GPU and back; then to the optimizer
        (2, 1, "fp32", "fp32", 4, 4),
        (1, 3, "bf16", "bf16", 4 + 2 * 5, 2),
        (3, 1, "bf16", "fp32", 4 * 2 + 4, 2),
        (3, 3, "bf16", "fp32", 4 * 2 * 3 + 4, 2),
        (3, 3, "bf16", "bf16", 2 * 2 * 3 + 4, 2),
    ],
)
def test_bytes_of_an_offloaded_optimizer(model, stage, micro_batches, precision, accumulation, gradients, weights):
    """For each weight of a rank's share; frozen ones are not updated."""
    asked = training(stage, micro_batches, OPTIMIZER, accumulation_dtype=accumulation)
    down, up = transfers(model, [], asked, precision, 4)
    assert (down.what, down.moved / (WEIGHTS / 4)) == ("gradients", gradients)
    assert (up.what, up.moved / (WEIGHTS / 4), up.beside) == ("weights, after the update", weights, None)


@pytest.mark.parametrize(
    ("stage", "micro_batches", "settings", "beside"),
    [
        (1, 1, {}, None),
        (2, 2, {}, None),
        (3, 2, {}, "backward"),
        (3, 2, NO_OVERLAP, None),
        (2, 2, OVERLAP, "backward"),
        (1, 1, OVERLAP, "backward"),
        (1, 2, OVERLAP, None),  # once a step, after the last backward pass but one
    ],
)
def test_gradients_are_moved_beside_what_reduces_them(model, stage, micro_batches, settings, beside):
    asked = training(stage, micro_batches, OPTIMIZER, **settings)
    assert transfers(model, [], asked, "bf16", 4)[0].beside == beside
    assert communication(model, [], asked, "bf16", 4)[0].beside == beside


def test_offloaded_weights_come_with_every_gathering(model):
    """Small ones stay, and are fetched once a step: a rank's share of them."""
    asked = training(3, 2, PARAMETERS)
    back, fetched = transfers(model, [], asked, "bf16", 4)
    assert (back.what, back.moved) == ("weights, after the update", 2 * WEIGHTS / 4)  # from the GPU that updates
    assert (fetched.moved, fetched.beside) == (2 * (WEIGHTS + 100) / 4, "computation")
    persistent = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0, "overlap_comm": False}}}
    each_time = transfers(model, [], training(3, 2, PARAMETERS, **persistent), "bf16", 4)[1]
    assert (each_time.moved, each_time.beside) == (2 * fetched.moved, None)
    both = transfers(model, [], training(3, 2, {**OPTIMIZER, **PARAMETERS}), "bf16", 4)
    assert [t.what for t in both] == ["gradients", "weights, as they are needed"]


def test_nothing_is_moved_or_updated_where_nothing_is_offloaded(model):
    kept = training(3, 2, {})
    assert transfers(model, [], kept, "bf16", 4) == []
    assert update_s(model, kept, 1) == 0
    assert update_s(model, training(3, 2, PARAMETERS), 1) == 0


def test_a_nodes_cpus_update_the_shares_of_its_ranks(model):
    asked = training(2, 1, OPTIMIZER)
    assert update_s(model, asked, 1) == WEIGHTS / UPDATED_PER_S
    assert update_s(model, asked, 4) == WEIGHTS / 4 / UPDATED_PER_S
    assert pytest.approx(100e9, rel=0.2) == UPDATED_PER_S * 28  # as it is said to be


def test_a_single_rank_moves_all_and_sends_nothing(model):
    alone = TrainingConfig(steps=1, batch_size=6, zero_stage=2, offload=OPTIMIZER)
    assert [t.moved for t in transfers(model, [], alone, "bf16", 1)] == [4 * WEIGHTS, 2 * WEIGHTS]
    assert communication(model, [], alone, "bf16", 1) == []
