"""Multiply-adds as the papers on forecasters print them, in the column FLOPs.

They come from fvcore (fvcore/nn/flop_count.py), of one sample through the network once. It differs from what torch
counts, products and convolutions alone, in three ways; SVQ, which this project computes in another order, in a fourth.
"""

import math

import torch
from torch import Tensor, nn

from stpredict.forecasters.config import ConvMixerConfig, SimVPConfig
from stpredict.layers.batch_norm import BatchNorm
from stpredict.quantizers.svq import Svq
from stpredict.training.flops import ShapesOnly

OF_BATCH_NORM, OF_OTHER_NORMS = 2, 5  # for each value, as fvcore has them for norms with weights
NORMS = (BatchNorm, nn.GroupNorm, nn.LayerNorm)


def published_macs(model: nn.Module, computed: float) -> float:
    """Of a forecaster whose forward pass takes ``computed`` multiply-adds for one sample, by torch's count."""
    config = model.config
    if not isinstance(config, SimVPConfig):
        return computed
    once = computed / model.passes  # a longer horizon than a pass gives is printed with one pass's
    macs = once + _of_norms(model)
    locations = config.input_frames * math.prod(config.grid)
    if isinstance(model.quantizer, Svq):
        macs += model.quantizer.macs_saved(locations)
    if isinstance(config.translator, ConvMixerConfig):
        # Convolutions with padding "same", as its published ones have, are another operator, unknown to fvcore.
        depthwise = (m for m in model.translator.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
        macs -= sum(math.prod(config.grid) * convolution.weight.numel() for convolution in depthwise)
    return macs


def _of_norms(model: nn.Module) -> float:
    """In one pass, by the shapes of what they get."""
    found = 0

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal found
        found += args[0].numel() * (OF_BATCH_NORM if isinstance(norm, BatchNorm) else OF_OTHER_NORMS)

    config, shapes = model.config, ShapesOnly(model)
    for module in shapes.model.modules():
        if isinstance(module, NORMS):
            module.register_forward_pre_hook(note)
    with shapes.mode, torch.no_grad():
        shapes.model(torch.empty(1, config.channels, config.input_frames, *config.size))
    return found / model.passes
