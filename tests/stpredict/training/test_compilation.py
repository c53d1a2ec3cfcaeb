from functools import partial

import torch
from torch import nn

from stpredict.training.compilation import compile_layers


class Widening(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, channels + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def test_every_one_of_many_unlike_layers_is_compiled_for_training_and_for_evaluation(monkeypatch):
    # With fullgraph, a layer that would silently be left uncompiled is an error.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    model = nn.Sequential(*(Widening(channels) for channels in range(2, 14)))
    compile_layers(list(model))
    for batch in (4, 4, 3):
        model.train()(torch.randn(batch, 2)).sum().backward()
        with torch.no_grad():
            assert model.eval()(torch.randn(batch, 2)).shape == (batch, 14)
