"""Attention by xformers (CUDA only), where it has a single call for the mask."""

from torch import Tensor

from stpredict.attention.masks import Causal, Full, Window


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Full | Causal | Window) -> Tensor:
    """As :func:`stpredict.attention.attention.attention`. xformers' tensors are ``(b, n, heads, d)``."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask, LowerTriangularFromBottomRightMask

    match mask:
        case Full():
            bias = None
        case Causal():
            bias = LowerTriangularFromBottomRightMask()
        case Window(size):
            bias = LocalAttentionFromBottomRightMask(window_left=size - 1, window_right=0)
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) if times > 1 else x for x in (k, v))
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias).transpose(1, 2)
