"""Parameters and multiply-adds of the published configs, translator by translator: those of the whole model less those
of encoder and decoder, which are worked out here."""

import pytest
import torch
from torch import nn
from translator_kinds import config_of

from stpredict.forecasters.translators.build import build_translator
from stpredict.layers.batch_norm import BatchNorm
from stpredict.training.flops import ShapesOnly, count_flops

MOVING_MNIST = (64, 512, 8, 4, 10, (1, 64, 64))
#: hid_S, hid_T, N_T, N_S, input frames, (channels, height, width): parameters, GMACs at batch 1.
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
    ("convnext", (32, 256, 8, 2, 4, (2, 32, 32))): (7_843_554, 2.079),  # TaxiBJ
    ("gsta", (32, 256, 8, 2, 12, (1, 32, 64))): (12_758_305, 7.006),  # WeatherBench-S
    ("incepu", (64, 256, 6, 2, 10, (1, 128, 128))): (12_152_385, 62.835),  # KTH
    ("gsta", (64, 256, 6, 2, 10, (3, 128, 160))): (15_634_243, 96.243),  # KittiCaltech
    ("gsta", (64, 512, 6, 4, 4, (3, 256, 256))): (28_763_907, 145.986),  # Human3.6M
}


def around(hidden_s, layers, frames, frame):
    """Parameters and multiply-adds of encoder and decoder; those of normalisation are five per value."""
    channels, height, width = frame
    parameters = macs = values = 0
    stride, into = 1, channels
    for i in range(layers):
        stride *= 1 + i % 2
        parameters += 9 * into * hidden_s + hidden_s + 2 * hidden_s
        macs += 9 * into * hidden_s / stride**2
        values += hidden_s / stride**2
        into = hidden_s
    for i in range(layers):
        up = 2 - i % 2
        parameters += (9 * hidden_s + 1) * hidden_s * up**2 + 2 * hidden_s
        macs += 9 * hidden_s * hidden_s * up**2 / stride**2
        stride //= up
        values += hidden_s / stride**2
    parameters += (hidden_s + 1) * channels
    macs += hidden_s * channels
    return parameters, frames * height * width * (macs + 5 * values)


@pytest.mark.parametrize(("kind", "sizes"), PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published(kind, sizes):
    hidden_s, hidden_t, blocks, layers, frames, frame = sizes
    grid = tuple(side >> layers // 2 for side in frame[1:])
    with torch.device("meta"):
        model = build_translator(config_of(kind), frames * hidden_s, hidden_t, blocks, grid)
    parameters, macs = around(hidden_s, layers, frames, frame)
    published, giga_macs = PUBLISHED[kind, sizes]
    assert parameters + sum(p.numel() for p in model.parameters()) == published
    x = torch.empty(1, frames * hidden_s, *grid)
    macs += count_flops(ShapesOnly(model), (x,), {}) / 2 + of_norms(model, x)
    if kind == "conv_mixer":  # whose depth-wise convolutions the published count leaves out
        macs -= 11**2 * (frames * hidden_s + (blocks - 1) * hidden_t) * grid[0] * grid[1]
    assert macs / 1e9 == pytest.approx(giga_macs, rel=1e-3)


def of_norms(model, x):
    """As published counts have them: two per value of batch normalisation, five of the others."""
    count = 0

    def add(norm, args, _):
        nonlocal count
        count += args[0].numel() * (2 if isinstance(norm, BatchNorm) else 5)

    for module in model.modules():
        if isinstance(module, BatchNorm | nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(add)
    model.eval()(x.to("meta"))
    return count
