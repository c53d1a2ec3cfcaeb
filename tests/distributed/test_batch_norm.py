"""BatchNorm over ranks that share a batch unevenly, against torch's on the whole of it."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stpredict.layers.batch_norm import BatchNorm
from stpredict.layers.recomputing import Recomputation

CHANNELS, SAMPLES, STEPS = 5, 12, 3
THEIRS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
#: How many of the samples each rank has.
PARTS = {1: [12], 2: [9, 3], 3: [7, 0, 5]}
CASES = {
    "samples": {"shape": ()},
    "sequences": {"shape": (7,)},
    "pictures": {"shape": (3, 4)},
    "videos": {"shape": (2, 3, 3)},
    "a mean of all batches": {"shape": (3, 4), "momentum": None},
    "not affine": {"shape": (3, 4), "affine": False},
    "not tracked": {"shape": (3, 4), "track_running_stats": False},
    "far from zero": {"shape": (3, 4), "offset": 3000.0},
    "bf16": {"shape": (3, 4), "dtype": torch.bfloat16},
    "recomputed": {"shape": (3, 4), "recomputed": True},
}
OURS_ALONE = ("shape", "offset", "dtype", "recomputed")


def data(case: dict, step: int) -> tuple[Tensor, Tensor]:
    """What goes in, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(step)
    x, gradient = torch.randn(2, SAMPLES, CHANNELS, *case["shape"], generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, CHANNELS + 1).view(CHANNELS, *(1 for _ in case["shape"])) + case.get("offset", 0.0)
    dtype = case.get("dtype", torch.float32)
    return x.to(dtype), gradient.to(dtype)


def learned(norm: nn.Module, case: dict, part: slice, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients of a part of the samples in the last of a few steps, and the state after them."""
    norm.train()
    for step in range(STEPS):
        norm.zero_grad()
        x, gradient = (tensor[part].to(dtype or tensor.dtype) for tensor in data(case, step))
        x = x.clone().requires_grad_()
        if case.get("recomputed") and isinstance(norm, BatchNorm):
            contexts = lambda: (nullcontext(), Recomputation())  # noqa: E731
            out = checkpoint(norm, x, use_reentrant=False, context_fn=contexts)
        else:
            out = norm(x)
        (out * gradient).sum().backward()
    found = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in norm.named_parameters()}}
    found |= {f"state.{name}": tensor for name, tensor in norm.state_dict().items()}
    if norm.track_running_stats:
        found["evaluated"] = norm.eval()(x).detach()
    return found


def ours(case: dict) -> BatchNorm:
    norm = BatchNorm(CHANNELS, **{key: value for key, value in case.items() if key not in OURS_ALONE})
    if norm.affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    return norm.to(case.get("dtype", torch.float32))


def theirs(case: dict) -> nn.Module:
    """torch's, in fp64, with the state of ours."""
    norm = THEIRS[2 + len(case["shape"])](
        CHANNELS, **{key: value for key, value in case.items() if key not in OURS_ALONE}
    )
    norm.load_state_dict(ours(case).state_dict())  # the same names
    return norm.double()


def work(rank: int, size: int, out: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=size)
    first = sum(PARTS[size][:rank])
    part = slice(first, first + PARTS[size][rank])
    found = {name: learned(ours(case), case, part) for name, case in CASES.items()}
    one = BatchNorm(CHANNELS)
    try:
        one(torch.zeros(int(rank == 0), CHANNELS))
        found["a single value"] = None
    except ValueError as error:
        found["a single value"] = str(error)
    torch.save(found, Path(out) / f"{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each of so many ranks has found."""
    out, size = tmp_path_factory.mktemp("batch_norm"), request.param
    if size == 1:
        work(0, 1, str(out))
    else:
        torch.multiprocessing.spawn(work, (size, str(out)), nprocs=size)
    return [torch.load(out / f"{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize("name", CASES)
def test_equals_torchs_on_the_whole_batch(ranks, name):
    case, parts = CASES[name], [found[name] for found in ranks]
    whole = learned(theirs(case), case, slice(None), torch.float64)
    # fp32 against fp64; bf16 rounds what comes out to 8 bits. Beside 3000, fp32 rounds what goes in.
    tolerance = {"bf16": 1.5e-2, "far from zero": 2e-3}.get(name, 2e-6)
    for key, right in whole.items():
        if key in ("out", "x", "evaluated"):
            got = torch.cat([part[key] for part in parts]).double()
        elif key.startswith("state."):
            for part in parts:
                assert torch.equal(part[key], parts[0][key]), key  # on all ranks the same, to the bit
            got = parts[0][key].double()
        else:
            got = sum(part[key].double() for part in parts)
        scale = max(1.0, right.double().abs().max().item())
        assert (got - right).abs().max().item() <= tolerance * scale, key


def test_running_statistics_stay_in_fp32_and_count_a_recomputed_step_once(ranks):
    for found in ranks:
        assert found["bf16"]["state.running_mean"].dtype == torch.float32
        assert found["bf16"]["out"].dtype == found["bf16"]["weight"].dtype == torch.bfloat16
        assert int(found["recomputed"]["state.num_batches_tracked"]) == STEPS
        for key, value in found["pictures"].items():
            assert torch.equal(value, found["recomputed"][key]), key


def test_one_value_per_channel_is_refused_by_every_rank(ranks):
    assert all("more than 1 value per channel" in found["a single value"] for found in ranks)
