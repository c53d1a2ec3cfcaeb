"""What a forward and backward pass keeps: linear in the micro-batch, for CUDA as there."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stpredict.estimates import activations
from stpredict.estimates.activations import Numbers, follow
from stpredict.estimates.cuda_kernels import cuda_kernels
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.training.computing import ActivationCheckpointingConfig
from tests.stpredict.estimates.planned import (
    SMALL_PRIOR,
    SMALL_TOKENIZER,
    planned_forecaster,
    planned_prior,
    planned_tokenizer,
)

FP32 = Numbers(torch.float32)
NONE = ActivationCheckpointingConfig()
PLANNED = {
    "prior": lambda: planned_prior(**SMALL_PRIOR),
    "tokenizer": lambda: planned_tokenizer(**SMALL_TOKENIZER),
    "forecaster": planned_forecaster,
}


def policy(name: str, every: int = 1) -> ActivationCheckpointingConfig:
    return ActivationCheckpointingConfig(policy=name, every=every)


@pytest.mark.parametrize("kind", ["prior", "tokenizer", "forecaster"])
@pytest.mark.parametrize("name", ["none", "selective", "layers"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_micro_batches_tell_any_other(kind, name, device, monkeypatch):
    planned = PLANNED[kind]()
    predicted = follow(planned, policy(name), FP32, device).bytes(5)
    monkeypatch.setattr(activations, "MEASURED", (5, 6))
    measured = follow(planned, policy(name), FP32, device).bytes(5)
    assert predicted.max() == pytest.approx(measured.max(), rel=0.001)
    assert measured.max() > 0


def test_every_gradient_is_finished_at_the_end_and_nothing_of_the_graph_is_left():
    found = follow(planned_prior(**SMALL_PRIOR), NONE, FP32, "cuda")
    parameters = sum(p.numel() for p in planned_prior(**SMALL_PRIOR).task.model.parameters())
    assert found.finished[0] == 0
    assert found.finished[-1] == parameters
    assert (np.diff(found.finished) >= 0).all()
    assert found.bytes(4)[-1] < 0.1 * found.bytes(4).max()


def test_checkpointing_keeps_less_the_more_it_recomputes():
    planned = planned_prior(**{**SMALL_PRIOR, "layers": 6})
    none, half, all_layers, selective = (
        follow(planned, config, FP32, "cuda").bytes(4).max()
        for config in (NONE, policy("layers", 2), policy("layers"), policy("selective"))
    )
    assert all_layers < half < none
    assert all_layers < selective < none


def test_half_the_numbers_take_half_the_memory_where_they_are_most_of_it():
    planned = planned_prior(**SMALL_PRIOR)
    whole = follow(planned, NONE, FP32, "cuda").bytes(64).max()
    half = follow(planned, NONE, Numbers(torch.bfloat16), "cuda").bytes(64).max()
    mixed = follow(planned, NONE, Numbers(torch.float32, torch.bfloat16), "cuda").bytes(64).max()
    assert 0.45 * whole < half < mixed < whole


def test_live_bytes_are_those_of_the_tensors_that_are_held():
    live = LiveBytes()
    given = torch.ones(100)
    live.ignore([given])
    with live:
        a = torch.zeros(1000)
        b = a[10:].view(-1)
        given.view(10, 10)
        c = a + 1
        assert live.bytes == 8000
        del a
        assert live.bytes == 8000  # the view holds it
        del b
        assert live.bytes == 4000
        c.resize_(2000)
        assert live.bytes == 8000
    del c
    assert (live.bytes, live.peak) == (0, 8000)


def test_what_cuda_keeps_of_dropout_and_norm():
    kept: list[torch.Tensor] = []
    norm, dropout = nn.RMSNorm(64), nn.Dropout(0.1)
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_kernels():
        x = torch.empty(8, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            dropout(x)
            norm(x)
    assert sorted((str(t.dtype), tuple(t.shape)) for t in kept if t is not norm.weight and t is not x) == [
        ("torch.bool", (8, 64)),
        ("torch.float32", (8, 1)),
    ]
