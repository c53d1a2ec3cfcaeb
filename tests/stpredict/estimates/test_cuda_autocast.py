"""CUDA's autocast, played on a CPU: torch's own lists, and what operators give by them."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stpredict.estimates.activations import Numbers, follow
from stpredict.estimates.cuda_autocast import FP32, FP32_RESULT, NORMS, WIDEST, cuda_autocast
from stpredict.estimates.cuda_kernels import cuda_kernels
from stpredict.training.computing import ActivationCheckpointingConfig
from tests.stpredict.estimates.planned import SMALL_TOKENIZER, planned_tokenizer


@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("FP32", FP32),
        ("FP32_SET_OPT_DTYPE", FP32_RESULT),
        ("PROMOTE", WIDEST),
    ],
)
def test_the_lists_are_those_of_this_torch(macro, ours):
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    (body,) = re.findall(rf"#define AT_FORALL_{macro}\(_\)(.*?)\n\n", header, re.DOTALL)
    listed = [".".join(re.split(r",\s*", name)) for name in re.findall(r"_\(([\w, ]+)\)", body)]
    assert sorted(ours.split()) == sorted(listed)
    assert all(f'"{name}"' in header for name in NORMS)


LOW, HIGH = torch.bfloat16, torch.float32
X, WHOLE = torch.rand(2, 4, 3, dtype=LOW), torch.rand(2, 4, 3)
IN_FP32 = {
    "group_norm": lambda: F.group_norm(X, 2),
    "layer_norm": lambda: F.layer_norm(X, (3,)),
    "rms_norm": lambda: F.rms_norm(X, (3,), torch.ones(3)),
    "softmax": lambda: X.softmax(-1),
    "log_softmax": lambda: X.log_softmax(-1),
    "cross_entropy": lambda: F.cross_entropy(X, torch.zeros(2, 3, dtype=torch.int64)),
    "pow": lambda: X**2,
    "exp": lambda: X.exp(),
    "sum": lambda: X.sum(),
    "sum of an axis": lambda: X.sum(1),
    "cumsum": lambda: X.cumsum(0),
    "norm": lambda: X.norm(),
    "norm of an axis": lambda: torch.norm(X, 2, 1),
    "vector norm": lambda: torch.linalg.vector_norm(X),
    "mse_loss": lambda: F.mse_loss(X, X),
    "upsampling": lambda: F.interpolate(X, scale_factor=2),
    "the widest": lambda: torch.addcmul(X, X, WHOLE),
}
IN_LOW = {
    "linear": lambda: F.linear(WHOLE, torch.ones(5, 3)),
    "matrix by vector": lambda: torch.mv(WHOLE[0], torch.ones(3)),
    "einsum": lambda: torch.einsum("abc,cd->abd", WHOLE, torch.ones(3, 2)),
    "convolution": lambda: F.conv1d(WHOLE, torch.ones(4, 4, 1)),
    "attention": lambda: F.scaled_dot_product_attention(WHOLE[None], WHOLE[None], WHOLE[None]),
    "padding": lambda: F.pad(X, (1, 1), mode="replicate"),
    "silu": lambda: F.silu(X),
    "all low": lambda: torch.addcmul(X, X, X),
}
CASES = [(name, call, dtype) for calls, dtype in ((IN_FP32, HIGH), (IN_LOW, LOW)) for name, call in calls.items()]


@pytest.mark.parametrize(("name", "call", "dtype"), CASES, ids=[case[0] for case in CASES])
def test_an_operator_gives_what_it_gives_on_cuda(name, call, dtype):
    with torch.autocast("cpu", dtype=LOW), cuda_autocast():
        assert call().dtype == dtype


def types_on_a_cpu() -> list[torch.dtype]:
    x = torch.ones(2, 4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [F.group_norm(x, 2).dtype, F.pad(x, (1, 1), mode="replicate").dtype, x.softmax(-1).dtype]


def test_afterwards_autocast_is_the_cpus_again():
    before = types_on_a_cpu()
    with cuda_autocast():
        assert types_on_a_cpu() == [torch.float32, torch.bfloat16, torch.float32]
    assert types_on_a_cpu() == before == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_on_cuda_a_tokenizer_keeps_its_norms_inputs_in_fp32():
    planned = planned_tokenizer(**SMALL_TOKENIZER)
    mixed, none = Numbers(torch.float32, torch.bfloat16), ActivationCheckpointingConfig()
    cpu, cuda = (follow(planned, none, mixed, device).bytes(4).max() for device in ("cpu", "cuda"))
    assert 1.15 * cpu < cuda < 1.5 * cpu


def test_on_cuda_a_norm_keeps_its_input_in_fp32_and_a_number_for_each_row():
    kept: list[torch.Tensor] = []
    x, weight = X.clone().requires_grad_(), torch.ones(3)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t)
    with torch.autocast("cpu", dtype=LOW), cuda_kernels(), hooks:
        F.rms_norm(x, (3,), weight)
    assert sorted((tuple(t.shape), t.dtype) for t in kept if t is not weight) == [((2, 4, 1), HIGH), ((2, 4, 3), HIGH)]
