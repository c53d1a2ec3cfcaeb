"""Parameters and multiply-adds of SimVP in the published configs."""

import pytest
import torch
from torch import nn
from translator_kinds import config_of

from stpredict.forecasters.config import SimVPConfig
from stpredict.forecasters.simvp import SimVP
from stpredict.layers.batch_norm import BatchNorm
from stpredict.training.flops import ShapesOnly, count_flops

#: hid_S, hid_T, N_T, N_S, input and output frames, (channels, height, width).
MOVING_MNIST = (64, 512, 8, 4, 10, 10, (1, 64, 64))
MOVING_MNIST_LARGE = (128, 1024, 24, 4, 10, 10, (1, 64, 64))
TAXIBJ = (32, 256, 8, 2, 4, 4, (2, 32, 32))
WEATHERBENCH = (32, 256, 8, 2, 12, 12, (1, 32, 64))
KTH = (64, 256, 6, 2, 10, 20, (1, 128, 128))
KITTICALTECH = (64, 256, 6, 2, 10, 1, (3, 128, 160))
HUMAN = (64, 512, 6, 4, 4, 4, (3, 256, 256))
#: Parameters, and 10⁹ multiply-adds at batch 1, of one pass where more frames are predicted than given.
PUBLISHED = {
    ("gsta", MOVING_MNIST): (46_769_665, 16.526),
    ("incepu", MOVING_MNIST): (57_946_113, 19.431),
    ("vit", MOVING_MNIST): (46_102_273, 16.928),
    ("swin", MOVING_MNIST): (46_105_409, 16.409),
    ("uniformer", MOVING_MNIST): (44_834_817, 16.449),
    ("mlp_mixer", MOVING_MNIST): (38_192_449, 14.651),
    ("conv_mixer", MOVING_MNIST): (3_919_361, 5.450),
    ("poolformer", MOVING_MNIST): (37_115_393, 14.076),
    ("convnext", MOVING_MNIST): (37_313_921, 14.124),
    ("van", MOVING_MNIST): (44_520_833, 15.951),
    ("hornet", MOVING_MNIST): (45_738_305, 16.271),
    ("moganet", MOVING_MNIST): (46_777_065, 16.519),
    ("tau", MOVING_MNIST): (44_656_001, 15.953),
    ("gsta", MOVING_MNIST_LARGE): (None, 152.2),
    ("convnext", TAXIBJ): (7_843_554, 2.079),
    ("gsta", WEATHERBENCH): (12_758_305, 7.006),
    ("incepu", KTH): (12_152_385, 62.835),
    ("gsta", KITTICALTECH): (15_634_243, 96.243),
    ("gsta", HUMAN): (28_763_907, 145.986),
}


@pytest.mark.parametrize(("kind", "sizes"), PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published(kind, sizes):
    parameters, giga_macs = PUBLISHED[kind, sizes]
    hidden_s, hidden_t, blocks, layers, given, predicted, (channels, *size) = sizes
    config = SimVPConfig(
        channels=channels,
        size=size,
        input_frames=given,
        output_frames=predicted,
        hid_S=hidden_s,
        hid_T=hidden_t,
        N_T=blocks,
        N_S=layers,
        translator=config_of(kind),
    )
    with torch.device("meta"):
        model = SimVP(config)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.empty(1, channels, given, *size, device="meta")
    macs = count_flops(ShapesOnly(model), (x,), {}) / 2 + of_norms(model, x)
    if kind == "conv_mixer":  # whose depth-wise convolutions the published count leaves out
        height, width = config.grid
        macs -= 11**2 * (given * hidden_s + (blocks - 1) * hidden_t) * height * width
    passes = -(-predicted // given)
    assert macs / passes / 1e9 == pytest.approx(giga_macs, rel=1e-3)


def of_norms(model, x):
    """As published counts have them: two per value of batch normalisation, five of the others."""
    count = 0

    def add(norm, args, _):
        nonlocal count
        count += args[0].numel() * (2 if isinstance(norm, BatchNorm) else 5)

    for module in model.modules():
        if isinstance(module, BatchNorm | nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(add)
    model.eval()(x)
    return count
