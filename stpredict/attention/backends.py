"""Which backend can compute which call of attention, why not, and which one ``auto`` takes."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from stpredict.attention.config import Backend
from stpredict.attention.masks import BlockCausal, Mask, Window

BACKENDS = tuple(name for name in get_args(Backend) if name != "auto")
HALVES = (torch.float16, torch.bfloat16)
FLASH_ATTN = (2, 7)


@dataclass(frozen=True)
class Call:
    """What of a call of attention decides who can compute it. ``mask`` is the simplest that says the same."""

    device: str
    dtype: torch.dtype
    head_width: int
    queries: int
    keys: int
    mask: Mask
    differentiates: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> "Call":
        differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return cls(q.device.type, q.dtype, q.shape[3], q.shape[2], k.shape[2], mask, differentiates)


def choose(backend: Backend, call: Call) -> str:
    """The backend by name. UsageError where the one that is asked for cannot compute this call."""
    if backend == "auto":
        return next(name for name in _preferred(call) if refusal(name, call) is None)
    if reason := refusal(backend, call):
        raise UsageError(f"attention backend {backend}: {reason}; use auto")
    return backend


def _preferred(call: Call) -> tuple[str, ...]:
    """Fastest first. Not measured yet on CUDA, where flash-attn has the fastest kernels; blocks smaller than its tiles
    cost it a second pass, but flex none. xformers' kernels are flash-attn's, older: it is left to those who ask."""
    if call.device != "cuda":
        return ("sdpa",)
    if call.queries < call.keys and not call.differentiates:  # flex would compile for every length of a cache
        return ("flash", "sdpa")
    if isinstance(call.mask, BlockCausal) and call.mask.block < 128:
        return ("flex", "flash", "sdpa")
    return ("flash", "flex", "sdpa") if isinstance(call.mask, BlockCausal | Window) else ("flash", "sdpa")


def refusal(backend: str, call: Call) -> str | None:
    """Why ``backend`` cannot compute ``call``; None if it can."""
    if backend == "sdpa":
        return None
    return missing(backend, call.device) or {"flash": _flash, "flex": _flex, "xformers": _xformers}[backend](call)


def _flash(call: Call) -> str | None:
    if call.dtype not in HALVES:
        return f"flash-attn computes in fp16 and bf16, not {_name(call.dtype)}"
    if call.head_width > 256 or call.head_width % 8:
        return f"flash-attn's heads are multiples of 8 up to 256 wide, not {call.head_width}"
    return _whole(call)


def _flex(call: Call) -> str | None:
    if call.device == "cpu" and call.differentiates:
        return "FlexAttention has no backward pass on a CPU"
    if call.dtype == torch.float64:
        return "FlexAttention does not compute in fp64"
    if call.device == "cuda" and call.head_width < 16:
        return f"FlexAttention's heads are at least 16 wide on CUDA, not {call.head_width}"
    return None


def _xformers(call: Call) -> str | None:
    if isinstance(call.mask, BlockCausal):
        return "xformers has no single call for block-causal attention"
    if call.dtype == torch.float64:
        return "xformers does not compute in fp64"
    if call.head_width % 8:
        return f"xformers' heads are multiples of 8 wide, not {call.head_width}"
    if isinstance(call.mask, Window) and (call.dtype not in HALVES or call.head_width > 256):
        return "xformers has windows in fp16 and bf16 alone, of heads up to 256 wide"
    return None


def _whole(call: Call) -> str | None:
    if isinstance(call.mask, BlockCausal) and call.queries != call.keys:
        return f"block-causal attention of {call.queries} queries that are the last of {call.keys} tokens"
    return None


@cache
def missing(backend: str, device: str) -> str | None:
    """Why ``backend`` does not work on this machine's ``device`` at all; None if it may."""
    match backend:
        case "flash":
            return (
                _no_cuda(device) or _no_package("flash-attn", "flash_attn.flash_attn_interface", FLASH_ATTN) or _old()
            )
        case "xformers":
            return _no_cuda(device) or _no_package("xformers", "xformers.ops")
        case "flex" if device not in ("cpu", "cuda"):
            return f"FlexAttention knows no {device}"
        case "flex" if device == "cuda":
            return _no_package("triton", "triton")
    return None


def _no_cuda(device: str) -> str | None:
    return None if device == "cuda" else "it computes on CUDA only"


def _old() -> str | None:
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"it needs an Ampere GPU or newer, not compute capability {capability}"


def _no_package(distribution: str, module: str, least: tuple[int, ...] = ()) -> str | None:
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    if tuple(int(part) for part in found.split(".")[: len(least)]) < least:
        return f"{distribution} {found} is older than {'.'.join(map(str, least))}"
    try:
        __import__(module)
    except Exception as error:  # built for another torch, for instance
        return f"{distribution} {found} cannot be imported: {' '.join(str(error).split())}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
