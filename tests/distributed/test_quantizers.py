"""Quantizers on two ranks that share a batch, built before they know of each other, against one on the whole of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stpredict.quantizers import config as configs
from stpredict.quantizers.build import build_quantizer
from stpredict.quantizers.plug_ins import mean_over_ranks

CHANNELS, SAMPLES, STEPS = 8, 4, 3
CASES = {
    "svq": configs.SvqConfig(codebook_size=32, learnable=False),
    "vq": configs.VqConfig(codebook_size=16),
    "residual": configs.ResidualVqConfig(codebook_size=16, quantizers=2, stochastic=False),
    "grouped": configs.GroupedResidualVqConfig(codebook_size=16, quantizers=2),
    "multi-head": configs.MultiHeadVqConfig(codebook_size=16, heads=4),
    "residual fsq": configs.ResidualFsqConfig(quantizers=2),
    "lfq": configs.LfqConfig(codebook_size=16),
    "residual lfq": configs.ResidualLfqConfig(codebook_size=16, quantizers=2),
}


def trained(models: dict, part: slice, share: float) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, gradients and codes of a part of the batch that is a share of the loss, in the last of a few steps."""
    found = {}
    for name, model in models.items():
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            whole, weight = torch.randn(2, SAMPLES, 3, CHANNELS, 4, 4, generator=generator)
            x = whole[part].clone().requires_grad_()
            model.zero_grad()
            out, commitment = model(x)
            loss = (out * weight[part]).sum() + (0 if commitment is None else 100 * share * commitment)
            loss.backward()
        found[name] = {
            "out": out.detach(),
            "x": x.grad,
            "loss": loss.detach()[None],
            "uses": getattr(model, "uses", None),
        }
        found[name] |= {f"gradient {key}": p.grad for key, p in model.named_parameters()}
        found[name] |= {f"state {key}": tensor.clone() for key, tensor in model.named_buffers()}
    return found


def models() -> dict:
    torch.manual_seed(0)
    return {name: build_quantizer(config, CHANNELS) for name, config in CASES.items()}


def work(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    built = models()
    for model in built.values():  # nor does a forward pass without ranks make them blind
        model.eval()(torch.zeros(1, 1, CHANNELS, 1, 1))
        model.train()
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    found = trained(built, slice(2 * rank, 2 * rank + 2), share=0.5)
    x = torch.tensor([rank + 1.0], requires_grad=True)
    mean = mean_over_ranks(x)
    (mean * (rank + 5)).sum().backward()  # ranks with unequal shares of the loss
    found["mean"] = mean.item(), x.grad.item()
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict, list[dict]]:
    out = tmp_path_factory.mktemp("quantizers")
    torch.multiprocessing.spawn(work, (str(out),), nprocs=2)
    return trained(models(), slice(None), share=1), [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_does(found, name):
    whole, parts = found[0][name], [part[name] for part in found[1]]
    for key, right in whole.items():
        if right is None:
            continue
        if key in ("out", "x"):
            got = torch.cat([part[key] for part in parts])
        elif key.startswith("state"):
            assert torch.equal(parts[0][key], parts[1][key]), key  # on both ranks the same, to the bit
            got = parts[0][key]
        else:
            got = sum(part[key] for part in parts)
        scale = max(1.0, right.abs().max().item())
        assert (got - right).abs().max().item() <= 2e-5 * scale, key


def test_a_mean_over_ranks_has_the_gradients_of_all_their_losses(found):
    assert [part["mean"] for part in found[1]] == [(1.5, (5 + 6) / 2)] * 2
