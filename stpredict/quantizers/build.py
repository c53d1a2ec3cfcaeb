"""The quantizer of a config. All take latents ``(b, t, c, h, w)`` and return the same shape and a commitment loss."""

from torch import nn

from stpredict.quantizers.config import AnyQuantizer, SvqConfig
from stpredict.quantizers.svq import Svq


def build_quantizer(config: AnyQuantizer, channels: int) -> nn.Module:
    """A module from latents ``(b, t, channels, h, w)`` to quantized ones of the same shape and type, and what keeps the
    encoder close to the codes: a scalar mean, or None where the quantizer has no such loss."""
    match config:
        case SvqConfig():
            return Svq(config, channels)
        case _:
            raise ValueError(f"no quantizer for {type(config).__name__}")
