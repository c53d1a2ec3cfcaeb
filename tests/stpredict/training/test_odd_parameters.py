"""Parameters and buffers of unusual kinds."""

import pytest
import torch
from torch import nn

from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import build_engine
from stpredict.training.pieces import Held, make_contiguous


def test_channels_last_models_are_saved_in_the_order_of_their_axes():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)).to(memory_format=torch.channels_last)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert not model[0].weight.is_contiguous()
    make_contiguous(model)
    pieces = Held("model", model, torch.optim.AdamW(model.parameters(), fused=True)).pieces()
    weights = {piece.name: piece.tensor.view(piece.shape) for piece in pieces if piece.kind == "weight"}
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert weights["0.weight"].data_ptr() == model[0].weight.data_ptr()  # a view: what is loaded is computed with


def test_a_parameter_without_axes_is_named():
    model = nn.Linear(2, 2)
    model.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"parameter temperature has no axes.*give it the shape \(1,\)"):
        build_engine(model, TrainingConfig(steps=1, batch_size=1), torch.float32, 1, 1)
