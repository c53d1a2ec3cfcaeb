"""torch.compile of a model's layers, one by one and in place: modules and the names of their parameters stay."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from data_pipeline.errors import UsageError
from stpredict.training.config import TrainingConfig

log = logging.getLogger(__name__)
# In which one layer is compiled at most: in training and in evaluation, for one size of batch and for any.
WAYS = 4


def compiles(layers: Sequence[nn.Module], training: TrainingConfig, device: torch.device) -> bool:
    """What ``training.compile`` means here. ``auto``: on CUDA, up to ZeRO-2 (at ZeRO-3 the hooks that gather parameters
    break the graph into pieces), where nothing is recomputed selectively. UsageError where it is asked for in vain."""
    selective = training.activation_checkpointing.policy == "selective"
    if training.compile == "auto":
        return device.type == "cuda" and training.zero_stage <= 2 and bool(layers) and not selective
    if training.compile and not layers:
        raise UsageError("training.compile: this model names no layers that could be compiled; use auto or false")
    if training.compile and selective:
        raise UsageError(
            "training.compile: what activation_checkpointing.policy selective keeps is not seen in compiled code; "
            "use policy layers, or compile auto or false"
        )
    return training.compile


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Before anything else is done to them: what is recomputed is then the compiled layer.

    Layers of one class share a cache. Those that are alike are compiled once; beyond torch's own limit, which 8 layers
    that are not alike reach, the rest would be computed as they stand.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, recompile_limit=WAYS * len(layers))
    log.info("%d layers are compiled in the first steps, which take longer", len(layers))
