"""Attention by mask description: one call, several backends."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from stpredict.attention import flex, xformers
from stpredict.attention.backends import HALVES, Call, choose
from stpredict.attention.config import Backend
from stpredict.attention.masks import BlockCausal, Causal, Mask, Window, simplest
from stpredict.attention.rectangles import block_causal
from stpredict.attention.strips import strips


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: Backend = "auto") -> Tensor:
    """Softmax attention. ``q`` (b, heads, n, d), ``k`` and ``v`` (b, key heads, m, d); returns (b, heads, n, d).

    Queries are the last n tokens of the m. ``heads`` is a multiple of ``key heads``, each of which serves as many heads
    of queries that follow each other (grouped-query attention). ValueError for shapes that do not fit; UsageError for a
    ``backend`` that cannot compute this call. Tensors without memory pass whatever the backend.
    """
    n, m = q.shape[2], k.shape[2]
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    mask = simplest(mask, n, m)
    ragged = isinstance(mask, BlockCausal) and mask.prefix_lengths is not None
    if ragged and len(mask.prefix_lengths) != len(q):
        raise ValueError(f"prefix_lengths of {len(mask.prefix_lengths)} samples do not fit a batch of {len(q)}")
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # as PyTorch does it for its own attention
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if isinstance(mask, BlockCausal) and mask.length is not None and mask.length < m:
        real, end = max(0, n - (m - mask.length)), mask.length
        shorter = BlockCausal(mask.block, mask.prefix, mask.prefix_lengths)
        out = attention(q[:, :, :real], k[:, :, :end], v[:, :, :end], shorter, backend) if real else q[:, :, :0]
        return F.pad(out, (0, 0, 0, n - real))
    out = _compute(q, k, v, mask, backend)
    return _without_padding(out, mask, m) if ragged else out


def _compute(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: Backend) -> Tensor:
    """Of sequences without padding at their end; what the padding of a prefix attends to is left open."""
    if q.device.type == "meta" or isinstance(q, FakeTensor):
        backend = "sdpa"  # its operators know their shapes and FLOPs
    match choose(backend, Call.of(q, k, v, mask)):
        case "flash":
            return block_causal(q, k, v, mask, "flash_attn") if isinstance(mask, BlockCausal) else _flash(q, k, v, mask)
        case "flex":
            return flex.attend(q, k, v, mask)
        case "xformers":
            return xformers.attend(q, k, v, mask)
        case _:
            kernel = _torch_kernel(q) if isinstance(mask, BlockCausal) and q.shape[2] == k.shape[2] else None
            return block_causal(q, k, v, mask, kernel) if kernel else strips(q, k, v, mask)


def _torch_kernel(q: Tensor) -> str | None:
    """PyTorch's kernel that gives the log-sum-exp of these."""
    if q.device.type in ("cpu", "meta"):
        return "torch_cpu"
    fits = q.dtype in HALVES and q.shape[3] <= 256 and q.shape[3] % 8 == 0
    ampere = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (8, 0)
    return "torch_cuda" if fits and ampere else None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    from flash_attn import flash_attn_func

    window = (mask.size - 1, 0) if isinstance(mask, Window) else (-1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, causal=isinstance(mask, Causal | Window), window_size=window).transpose(1, 2)


def _without_padding(out: Tensor, mask: BlockCausal, m: int) -> Tensor:
    """0 for the padding of the prefixes."""
    i = torch.arange(m - out.shape[2], m, device=out.device)
    padding = (i < mask.prefix) & (i >= mask.prefix_lengths.to(out.device)[:, None])
    return out.masked_fill(padding[:, None, :, None], 0)
