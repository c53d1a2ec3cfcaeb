"""The cells of recurrent forecasters: one layer at one time. All gates that see the same input are one convolution, and
none has a bias, as in every published comparison."""

import torch
from torch import Tensor, nn

FORGET_BIAS = 1.0  # of PredRNN's two forget gates


def convolution(channels: int, out: int, kernel: int) -> nn.Conv2d:
    """``(b, channels, h, w)`` to ``(b, out, h, w)``; ``kernel`` is odd."""
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


class ConvLstmCell(nn.Module):
    """Input ``(b, channels, h, w)``, hidden state and cell ``(b, hidden, h, w)`` to the new state and cell (Shi et al.
    2015, arXiv:1506.04214, equation 3). No gate sees the cell: published comparisons are made without peepholes."""

    def __init__(self, channels: int, hidden: int, kernel: int):
        super().__init__()
        self.of_input = convolution(channels, 4 * hidden, kernel)
        self.of_state = convolution(hidden, 4 * hidden, kernel)

    def forward(self, x: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.of_input(x) + self.of_state(state)).chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class SpatiotemporalLstmCell(nn.Module):
    """Like a ConvLSTM's, with a second memory ``(b, hidden, h, w)`` that comes from the layer below and goes to the one
    above (ST-LSTM; Wang et al. 2017, section 3.1). Returns state, cell and memory."""

    def __init__(self, channels: int, hidden: int, kernel: int):
        super().__init__()
        self.hidden = hidden
        self.of_input = convolution(channels, 7 * hidden, kernel)
        self.of_state = convolution(hidden, 4 * hidden, kernel)
        self.of_memory = convolution(hidden, 3 * hidden, kernel)
        self.of_both = convolution(2 * hidden, hidden, kernel)
        self.joined = convolution(2 * hidden, hidden, 1)

    def forward(self, x: Tensor, state: Tensor, cell: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_cell, of_memory, output = self.of_input(x).split([3 * self.hidden, 3 * self.hidden, self.hidden], dim=1)
        of_state, output_of_state = self.of_state(state).split([3 * self.hidden, self.hidden], dim=1)
        cell = _remembered(cell, of_cell + of_state)
        memory = _remembered(memory, of_memory + self.of_memory(memory))
        both = torch.cat([cell, memory], dim=1)
        output = (output + output_of_state + self.of_both(both)).sigmoid()
        return output * self.joined(both).tanh(), cell, memory


def _remembered(memory: Tensor, gates: Tensor) -> Tensor:
    i, f, g = gates.chunk(3, dim=1)
    return (f + FORGET_BIAS).sigmoid() * memory + i.sigmoid() * g.tanh()
