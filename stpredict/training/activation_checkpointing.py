"""Activation checkpointing: what a layer computes in the forward pass is not kept, but computed again when the backward
pass comes to it (Chen et al. 2016, arXiv:1604.06174). It costs up to one more forward pass and saves the memory of what
the layers keep.

A layer's ``forward`` is replaced where it stands: modules and the names of their parameters stay as they are.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from data_pipeline.errors import UsageError
from stpredict.layers.recomputing import Recomputation
from stpredict.training.computing import ActivationCheckpointingConfig

# What `selective` keeps, since it is dear to compute: by name, as not every build of torch has all of them. The last
# two are stpredict/attention's and flash-attn's.
_KEPT = {
    *("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "mkldnn_convolution"),
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "block_causal_attention",
    "_flash_attn_forward",
}


def recompute(layers: Sequence[nn.Module], config: ActivationCheckpointingConfig) -> None:
    """Has every ``config.every``-th of ``layers`` recomputed, as ``config.policy`` says. UsageError without layers."""
    if config.policy == "none":
        return
    if not layers:
        raise UsageError(
            f"training.activation_checkpointing.policy {config.policy}: this model names no layers that could be "
            "recomputed; use none"
        )
    contexts = _selecting if config.policy == "selective" else _everything
    for layer in layers[:: config.every]:
        layer.forward = _recomputed(layer, layer.forward, contexts)


def _recomputed(layer: nn.Module, forward: Callable, contexts: Callable) -> Callable:
    # Without early stopping, a recomputation runs to its end, with all hooks of the modules in it: ZeRO-3 gathers and
    # releases parameters in them.
    def begun_at_its_end(*args, **kwargs):
        return tree_map_only(Tensor, _Beginning.apply, forward(*args, **kwargs))

    run = partial(checkpoint, begun_at_its_end, use_reentrant=False, context_fn=contexts, early_stop=False)

    @wraps(forward)
    def either(*args, **kwargs):
        again = layer.training and torch.is_grad_enabled()
        return run(*args, **kwargs) if again else forward(*args, **kwargs)

    return either


class _Beginning(torch.autograd.Function):
    """Its input. The backward pass of a layer begins with it, and with it the recomputation: later, the last module
    would have been gathered for its backward pass already, and released again by being recomputed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradient


def _everything():
    return nullcontext(), Recomputation()


def _selecting():
    first, again = create_selective_checkpoint_contexts(_policy)
    return _beside(first), _Selection(_beside(again))


def _beside(mode: TorchDispatchMode) -> TorchDispatchMode:
    """``mode``, which operators pass by that are not kept. torch would count them, and refuse a recomputation that has
    others than the forward pass had: as with ZeRO-3, whose fetching of large models is not the same in both."""

    class Beside(type(mode)):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if _is_kept(func):
                return super().__torch_dispatch__(func, types, args, kwargs)
            return func(*args, **(kwargs or {}))

    mode.__class__ = Beside
    return mode


class _Selection(Recomputation):
    def __init__(self, kept):
        self.kept = kept

    def __enter__(self) -> None:
        super().__enter__()
        self.kept.__enter__()

    def __exit__(self, *error) -> None:
        self.kept.__exit__(*error)
        super().__exit__(*error)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operator) -> bool:
    name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else ""
    return name in _KEPT and operator.namespace in ("aten", "stpredict", "flash_attn")
