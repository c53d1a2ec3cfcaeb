"""How weights begin, translator by translator: published results were trained from there."""

import math

import pytest
import torch
from translator_kinds import KINDS, translator

HE, NARROW, TORCH = "he", "narrow", "torch"
#: Of convolutions and linear layers in a block between the first and the last; by name where they differ.
WEIGHTS = {
    "gsta": HE,
    "van": HE,
    "tau": {"mixer": TORCH, "mlp": HE},
    "vit": NARROW,
    "swin": NARROW,
    "uniformer": {"position": TORCH, "block": NARROW},
    "mlp_mixer": NARROW,
    "conv_mixer": HE,
    "poolformer": NARROW,
    "convnext": HE,
    "hornet": {"mixer": HE, "mlp": NARROW},
    "moganet": HE,
}
SCALES = {
    **dict.fromkeys(("gsta", "van", "tau"), 1e-2),
    **dict.fromkeys(("moganet", "poolformer"), 1e-5),
    **dict.fromkeys(("convnext", "hornet", "uniformer"), 1e-6),
}


def deviation(kind, weight, groups):
    match kind:
        case "he":  # by fan-out
            return math.sqrt(2 / (weight[0, 0].numel() * len(weight) / groups))
        case "narrow":
            return 0.02
        case "torch":  # uniform within 1 / sqrt(fan-in)
            return 1 / math.sqrt(3 * weight[0].numel())


def layers(module):
    return [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    ]


def check(name, layer, kind):
    groups = getattr(layer, "groups", 1)
    expected = deviation(kind, layer.weight, groups)
    error = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors
    assert layer.weight.std().item() == pytest.approx(expected, rel=error), name
    if layer.bias is not None:
        assert layer.bias.any() == (kind == TORCH), name


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weights_of_a_block_begin_as_published(kind):
    torch.manual_seed(0)
    block = translator(kind, channels=64, hidden=128, blocks=3).blocks[1].block
    found = layers(block)
    assert len(found) >= 2
    for name, layer in found:
        rule = WEIGHTS[kind]
        check(name, layer, rule if isinstance(rule, str) else rule[name.split(".")[0]])


def test_the_local_blocks_of_uniformer_begin_so_that_gradients_keep_their_variance():
    torch.manual_seed(0)
    for name, layer in layers(translator("uniformer", channels=128).blocks[0].block):
        check(name, layer, HE)


def test_incepu_and_the_convolutions_after_first_and_last_block_begin_as_torch_has_them():
    torch.manual_seed(0)
    for name, layer in layers(translator("incepu", channels=64, hidden=128)):
        check(name, layer, TORCH)
    for index in (0, -1):
        check("project", translator("gsta", channels=64, hidden=128).blocks[index].project, TORCH)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_scales_begin_at_the_published_values(kind):
    scales = [scale for name, scale in translator(kind).named_parameters() if name.endswith(".scale")]
    if kind == "uniformer":
        assert len(scales) == 2  # of the one block with attention
    assert bool(scales) == (kind in SCALES)
    for scale in scales:
        torch.testing.assert_close(scale.detach(), torch.full_like(scale, SCALES[kind]))


def test_small_values_beside_layer_scales():
    sigmas = [value for name, value in translator("moganet").named_parameters() if name.endswith("sigma")]
    assert len(sigmas) == 6
    assert all((sigma == 1e-5).all() for sigma in sigmas)
    table = translator("swin", hidden=512, grid=(14, 14)).blocks[1].block.mixer.bias
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
