"""Whether an attention backend works on this machine, found by a small call; for `stpredict doctor`."""

import torch

from stpredict.attention.attention import attention
from stpredict.attention.backends import missing
from stpredict.attention.masks import BlockCausal, Causal
from stpredict.attention.reference import reference_attention

TOLERANCE = 0.05  # bf16 has 8 bits


def try_backend(backend: str) -> str:
    """What it can do here. RuntimeError where it does not work, or gives something else than the dense reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := missing(backend, device):
        raise RuntimeError(reason)
    if backend == "flex" and device == "cpu":
        return "on this CPU, without a backward pass: for those who ask for it; `auto` takes sdpa"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = [torch.randn(1, 2, 300, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = Causal() if backend == "xformers" else BlockCausal(256)
    out = attention(*inputs, mask, backend)
    exact = reference_attention(*(x.float() for x in inputs), mask)
    found, expected = (torch.autograd.grad(x.float().square().sum(), inputs) for x in (out, exact))
    for ours, reference in zip((out, *found), (exact, *expected), strict=True):
        error = (ours - reference).abs().max().item()
        if not error <= TOLERANCE * max(1, reference.abs().max().item()):
            raise RuntimeError(f"differs from the dense reference by {error:.2g}")
    return "causal masks and windows" if backend == "xformers" else "all masks"
