"""The toy with layers: for what is done to them one by one. Run as ``toy.py`` is."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from launcher.rank import leave
from stpredict.layers.recomputing import recomputing
from tests.distributed.toy import WIDTH, ToyTask, main


class Layer(nn.Module):
    """``seen`` is a state that a training step moves once; ``mark`` is as the toy has it. A frozen part first, and a
    weight that stands in the layer itself. The backward pass begins in the module that is last, as a transformer's."""

    def __init__(self, dropout: float):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm, self.first, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.runs += 1
            if not recomputing():
                self.seen.add_(1)
        hidden = torch.tanh(self.first(self.norm(self.scale * x + self.frozen(x))))
        return x + self.second(self.dropout(hidden))


class DeepModel(nn.Module):
    def __init__(self, dropout: float, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mark", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class DeepTask(ToyTask):
    def __init__(self, trial: dict):
        super().__init__()
        self.model = DeepModel(trial.get("dropout", 0.0))

    def layers(self) -> nn.ModuleList:
        return self.model.layers


if __name__ == "__main__":
    main(Path(sys.argv[1]), DeepTask)
    leave(0)
