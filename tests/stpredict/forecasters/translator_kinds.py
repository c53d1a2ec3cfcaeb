"""Every translator, small, for tests."""

import torch
from pydantic import TypeAdapter
from torch import nn

from stpredict.forecasters.config import AnyTranslator
from stpredict.forecasters.translators.build import build_translator
from stpredict.layers.batch_norm import BatchNorm

KINDS = (
    *("gsta", "incepu", "vit", "swin", "uniformer", "mlp_mixer", "conv_mixer"),
    *("poolformer", "convnext", "van", "hornet", "moganet", "tau"),
)


def config_of(kind: str, **fields):
    return TypeAdapter(AnyTranslator).validate_python({"kind": kind} | fields)


def translator(kind: str, channels=24, hidden=16, blocks=3, grid=(8, 12), **fields) -> nn.Module:
    return build_translator(config_of(kind, **fields), channels, hidden, blocks, grid)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` in float64, with weights and running statistics of which none is 0 or small: layer scales would hide
    what blocks compute."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
        for norm in module.modules():
            if isinstance(norm, BatchNorm):
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return module
