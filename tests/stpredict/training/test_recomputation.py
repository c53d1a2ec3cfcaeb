"""What is kept of a forward pass, and what is computed again, on the models themselves."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.errors import UsageError
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior
from stpredict.training.activation_checkpointing import recompute
from stpredict.training.computing import ActivationCheckpointingConfig


def prior() -> NextBlockPrior:
    torch.manual_seed(0)
    config = NextBlockConfig(width=64, layers=4, heads=2, block=(1, 4, 4), dropout=0.1)
    return NextBlockPrior(config, 32, (8, 8, 8))


def tokens() -> torch.Tensor:
    return torch.randint(0, 32, (2, 512), generator=torch.Generator().manual_seed(0))


def recomputed(policy: str, every: int = 1) -> NextBlockPrior:
    model = prior()
    recompute(model.layers, ActivationCheckpointingConfig(policy=policy, every=every))
    return model


def kept_bytes(model: nn.Module) -> int:
    """What a forward pass has allocated and not freed when it ends."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(tokens())
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def backward_calls(model: nn.Module) -> list[str]:
    loss = model(tokens()).square().mean()
    with Counted() as counted:
        loss.backward()
    return counted.calls


def test_memory_falls_by_policy():
    whole, selective, second, layers = (
        kept_bytes(recomputed(*arguments)) for arguments in (("none",), ("selective",), ("layers", 2), ("layers",))
    )
    assert layers < 0.3 * whole
    assert layers < second < 0.7 * whole
    assert layers < selective < 0.7 * whole


def test_selective_computes_no_product_and_no_attention_again():
    kept, layers, selective = (backward_calls(recomputed(policy)) for policy in ("none", "layers", "selective"))
    attention = "block_causal_attention"
    in_a_forward = 4  # layers
    assert (kept.count(attention), layers.count(attention), selective.count(attention)) == (0, in_a_forward, 0)
    assert kept.count("mm") == selective.count("mm") < layers.count("mm")
    assert selective.count("silu") == layers.count("silu") == 4  # one in each layer


@pytest.mark.parametrize("policy", ["layers", "selective"])
def test_names_stay_and_gradients_are_the_same_to_the_bit_with_dropout(policy):
    gradients = []
    for model in (prior(), recomputed(policy)):
        torch.manual_seed(1)
        model(tokens()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    first, second = gradients
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_recomputed_where_there_is_no_backward_pass():
    model = recomputed("layers").eval()
    with torch.no_grad(), Counted() as counted:
        model(tokens())
    assert counted.calls.count("silu") == 4


def test_a_model_without_layers_is_refused_in_a_line():
    with pytest.raises(
        UsageError, match="policy layers: this model names no layers that could be recomputed; use none"
    ):
        recompute([], ActivationCheckpointingConfig(policy="layers"))
    recompute([], ActivationCheckpointingConfig())
