"""FLOPs of the model's forward passes, a multiply-add counted as two, and what the hardware could do at most."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stpredict.training.gpu_peaks import known_peak
from stpredict.training.task import Task

log = logging.getLogger(__name__)

# The backward pass costs two forwards: the gradient of what went in, and of the weights. What activation checkpointing
# computes again is no progress, and is not counted: that makes it MFU, not HFU (Chowdhery et al. 2022,
# arXiv:2204.02311, appendix B).
FORWARDS_PER_STEP = 3


class ForwardFlops:
    """Counts the FLOPs of what an engine's model computes in training.

    To be made before DeepSpeed takes the model over: it counts on a copy that has shapes but no memory.
    """

    def __init__(self, task: Task):
        self._task, self._shapes = task, ShapesOnly(task.model)
        self._calls: dict[tuple, float] = {}
        self._flops: dict[tuple, float] = {}
        self._arguments: dict[tuple, tuple[tuple, dict]] = {}

    def watch(self, engine: nn.Module) -> None:
        engine.register_forward_pre_hook(self._note, with_kwargs=True)

    def forget(self) -> None:
        self._calls = {}

    def take(self) -> float:
        """FLOPs of the forwards since the last call, on this rank; 0 if they cannot be counted."""
        calls, self._calls = self._calls, {}
        for key in calls.keys() - self._flops.keys():
            self._flops[key] = self._count(*self._arguments[key])
        return sum(times * self._flops[key] for key, times in calls.items())

    def _note(self, _engine: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._task.model.training:  # the engine itself is always so
            return
        key = tuple(
            (leaf.shape, leaf.dtype) if torch.is_tensor(leaf) else repr(leaf) for leaf in tree_leaves((args, kwargs))
        )
        if key not in self._calls:
            self._calls[key] = 0
            self._arguments[key] = tree_map(_shape_only, (args, kwargs))
        self._calls[key] += 1 if torch.is_grad_enabled() else 1 / FORWARDS_PER_STEP  # a discriminator learns alone

    def _count(self, args: tuple, kwargs: dict[str, Any]) -> float:
        flops = self._task.forward_flops(*args, **kwargs)
        if flops is not None:
            return flops
        try:
            return count_flops(self._shapes, args, kwargs)
        except Exception as error:  # a model that looks at its values, for instance: no reason not to train
            log.warning("the model's FLOPs are not counted, and TFLOP/s not logged: %r", error)
            return 0.0


class ShapesOnly:
    """A copy of a model that computes shapes alone, whatever becomes of the model."""

    def __init__(self, model: nn.Module):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            shapes = {id(buffer): torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in model.buffers()}
            for weight in model.parameters():
                shapes[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)
        self.model = copy.deepcopy(model, shapes).eval()


def count_flops(shapes: ShapesOnly, args: tuple, kwargs: dict[str, Any]) -> float:
    """FLOPs of one forward: of its matrix products, convolutions and attention. Of block-causal attention the pairs
    count that see each other, elsewhere every pair does."""

    def fake(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value

    # FlopCounterMode knows the GPU's kernels of attention, and would take the CPU's for nothing.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with torch.no_grad(), shapes.mode, counter:
        args, kwargs = tree_map(fake, (args, kwargs))
        shapes.model(*args, **kwargs)
    return float(counter.get_total_flops())


def peak_tflops(device: torch.device, dtype: torch.dtype, given: float | None) -> float | None:
    """What one rank's hardware could do at most: what the config has ``given``, or the table; None, with a line in the
    log that says how to get it, where neither knows."""
    if given is not None:
        return given
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if precision is None:
        precision = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    peak = known_peak(name, precision)
    if peak is None:
        log.info(
            "no MFU: the %s peak of %s is not known; training.peak_tflops (TFLOP/s of one rank) would give it",
            precision,
            name,
        )
    return peak


def _shape_only(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if torch.is_tensor(value) else value


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(q, k, v)
