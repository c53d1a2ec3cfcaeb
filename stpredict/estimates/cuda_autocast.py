"""CUDA's autocast on tensors of the CPU, whose own has other rules: what it computes in fp32, and so keeps, is more.

Above all norms: on CUDA group_norm, layer_norm and rms_norm are among the operators in fp32, on a CPU they are not. The
lists are torch's own (torch/include/ATen/autocast_mode.h; docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can
autocast to float32"), the test of this file holds them to it. What is in none of them computes in the lower type.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_CPU, _CUDA = "AutocastCPU", "AutocastCUDA"
FP32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
    pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm
    nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss
    kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
    upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
"""
# They give fp32 and need no copy of their input for it, unless they make one themselves.
FP32_RESULT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
NORMS = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}  # with a type
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Meanwhile autocast of the CPU follows CUDA's lists, in the whole process and inside autograd."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that an operator is replaced
            for name, kernel in _kernels().items():
                library.impl(name, kernel, _CPU)
        yield
    finally:
        library._destroy()


def _kernels() -> dict[str, Callable]:
    dispatched = torch._C._dispatch_get_registrations_for_dispatch_key
    cpu, cuda = (
        {name.removeprefix("aten::") for name in dispatched(key) if name.startswith("aten::")} for key in (_CPU, _CUDA)
    )
    in_fp32, with_result, widest = FP32.split(), FP32_RESULT.split(), WIDEST.split()
    lower = cuda - cpu - {*in_fp32, *with_result, *NORMS, *widest}
    return (
        dict.fromkeys(cpu - cuda, torch.library.fallthrough_kernel)
        | {name: _cast(name, lambda _: torch.get_autocast_dtype("cpu")) for name in lower}
        | {name: _cast(name, lambda _: torch.float32) for name in in_fp32}
        | {name: _cast(name, _widest) for name in widest}
        | {name: _typed(name) for name in with_result}
        | {name: _norm(typed) for name, typed in NORMS.items()}
    )


def _cast(name: str, to: Callable[[list[Tensor]], torch.dtype]) -> Callable:
    operator = _operator(name)

    def kernel(*args, **kwargs):
        wanted = to([leaf for leaf in tree_leaves((args, kwargs)) if _is_cast(leaf)])
        args, kwargs = tree_map(lambda value: value.to(wanted) if _is_cast(value) else value, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return operator(*args, **kwargs)

    return kernel


def _typed(name: str) -> Callable:
    operator = _operator(name)
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("dtype") is None and _is_cast(given["self"]):
            given["dtype"] = torch.float32
        with torch.autocast("cpu", enabled=False):
            return operator(**given)

    return kernel


def _norm(typed: str) -> Callable:
    operator = _operator(typed)
    rest = {"p": 2, "dim": None, "keepdim": False}
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(*args, **kwargs):
        given = rest | dict(zip(names, args, strict=False)) | kwargs
        given = {name: value for name, value in given.items() if name in names}
        with torch.autocast("cpu", enabled=False):
            return operator(**given, dtype=torch.float32 if _is_cast(given["self"]) else given["self"].dtype)

    return kernel


def _operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _is_cast(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _widest(tensors: list[Tensor]) -> torch.dtype:
    low = torch.get_autocast_dtype("cpu")
    return torch.float32 if any(tensor.dtype == torch.float32 for tensor in tensors) else low
