"""The quantizer of a config."""

from torch import nn

from stpredict.quantizers.config import AnyQuantizer, SvqConfig, SvqRawConfig
from stpredict.quantizers.plug_ins import plug_in
from stpredict.quantizers.svq import Svq
from stpredict.quantizers.svq_raw import SvqRaw


def build_quantizer(config: AnyQuantizer, channels: int) -> nn.Module:
    """A module from latents ``(b, t, channels, h, w)`` to quantized ones of the same shape and type, and what keeps the
    encoder close to the codes: a scalar mean, or None in evaluation and where the quantizer has no such loss.

    Those that choose codes have ``uses`` of the last forward pass (:class:`~stpredict.quantizers.plug_ins.PlugIn`);
    those that weigh them have ``weights(latents)``. UsageError where the channels cannot be cut as ``config`` says.
    """
    match config:
        case SvqConfig():
            return Svq(config, channels)
        case SvqRawConfig():
            return SvqRaw(config, channels)
        case _:
            return plug_in(config, channels)
