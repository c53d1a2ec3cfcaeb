"""ConvLSTM and PredRNN: recurrent forecasters over patches, as published comparisons train them.

At each time a stack of cells takes one frame and predicts the next. After the input frames it is given its own
predictions; in training, some true frames in their place (``forecasters/recurrent_task.py``).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from stpredict.forecasters.config import RecurrentConfig
from stpredict.forecasters.recurrent_cells import ConvLstmCell, SpatiotemporalLstmCell
from stpredict.forecasters.simvp import Forecast, padded


class Recurrent(nn.Module, ABC):
    """Scaled frames ``(b, c, t_in, h, w)`` to the ``output_frames`` that follow.

    In training it is called with all frames but the last, ``(b, c, t_in + t_out - 1, h, w)``, and ``shown``, bool
    ``(b, t_out - 1)``: which of those after the input frames it sees as they are, and not as it predicted them. It
    returns its prediction of the frame after each. ValueError for other frames than these.
    """

    cell: type[nn.Module]
    drop_rates = ()  # it has no residual branches

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        folded = config.channels * config.patch**2
        inputs = (folded, *config.hidden[:-1])
        self.cells = nn.ModuleList(
            self.cell(channels, hidden, config.kernel) for channels, hidden in zip(inputs, config.hidden, strict=True)
        )
        self.readout = nn.Conv2d(config.hidden[-1], folded, 1, bias=False)

    @property
    def commits(self) -> bool:
        """Whether its forecasts come with a commitment: never."""
        return False

    def layers(self) -> list[nn.Module]:
        """In the order of the forward pass, each of which is called once for every frame."""
        return list(self.cells)

    @abstractmethod
    def beginning(self, x: Tensor) -> Any:
        """What is remembered before the first frame ``x``, in patches."""

    @abstractmethod
    def after(self, x: Tensor, remembered: Any) -> tuple[Tensor, Any]:
        """The last layer's state after one more frame, in patches, and what is remembered then."""

    def forward(self, frames: Tensor, shown: Tensor | None = None) -> Forecast:
        config = self.config
        given, steps = config.input_frames, config.input_frames + config.output_frames - 1
        wanted = (config.channels, given if shown is None else steps, *config.size)
        if frames.shape[1:] != wanted:
            raise ValueError(f"frames (c, t, h, w) are {tuple(frames.shape[1:])}, this model takes {wanted}")
        true = [self._folded(frame.to(self.readout.weight.dtype)) for frame in frames.unbind(dim=2)]
        remembered = self.beginning(true[0])
        predicted: list[Tensor] = []
        for time in range(steps):
            if time < given:
                x = true[time]
            else:
                x = self._seen_again(predicted[-1])
                if shown is not None:
                    x = torch.where(shown[:, time - given, None, None, None], true[time], x)
            state, remembered = self.after(x, remembered)
            predicted.append(self.readout(state))
        if shown is None:
            predicted = predicted[given - 1 :]
        return Forecast(torch.stack([self._unfolded(x) for x in predicted], dim=2))

    def _zeros(self, x: Tensor) -> list[Tensor]:
        """A state of each layer before the first frame ``x``. They ask for a gradient, as all later ones do: compiled
        cells would be compiled once more for those that do not, and for tensors that are used twice."""
        sizes = [(len(x), hidden, *x.shape[2:]) for hidden in self.config.hidden]
        return [x.new_zeros(size, requires_grad=torch.is_grad_enabled()) for size in sizes]

    def _folded(self, frame: Tensor) -> Tensor:
        """``(b, c, h, w)`` to patches ``(b, C, h', w')``, padded where they do not divide it."""
        patch = self.config.patch
        return rearrange(padded(frame, patch), "b c (h p) (w q) -> b (p q c) h w", p=patch, q=patch)

    def _unfolded(self, patches: Tensor) -> Tensor:
        """Back, without the padding."""
        patch, (height, width) = self.config.patch, self.config.size
        frame = rearrange(patches, "b (p q c) h w -> b c (h p) (w q)", p=patch, q=patch)
        return frame[..., :height, :width]

    def _seen_again(self, predicted: Tensor) -> Tensor:
        """A predicted frame as it goes in again: padded like a true one, since nobody teaches it the padding."""
        height, width = self.config.size
        whole = height % self.config.patch == 0 and width % self.config.patch == 0
        return predicted if whole else self._folded(self._unfolded(predicted))


class ConvLstm(Recurrent):
    """Each layer has a state and a cell."""

    cell = ConvLstmCell

    def beginning(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._zeros(x), self._zeros(x), strict=True))

    def after(self, x: Tensor, remembered: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        new = []
        for layer, (state, cell) in zip(self.cells, remembered, strict=True):
            x, cell = layer(x, state, cell)
            new.append((x, cell))
        return x, new


class PredRnn(Recurrent):
    """Each layer has a state and a cell; one memory goes up through the layers, and from the last one to the first of
    the next time (Wang et al. 2017, section 3.2)."""

    cell = SpatiotemporalLstmCell

    def beginning(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        return list(zip(self._zeros(x), self._zeros(x), strict=True)), self._zeros(x)[0]

    def after(self, x: Tensor, remembered: tuple[list, Tensor]) -> tuple[Tensor, tuple[list, Tensor]]:
        of_layers, memory = remembered
        new = []
        for layer, (state, cell) in zip(self.cells, of_layers, strict=True):
            x, cell, memory = layer(x, state, cell, memory)
            new.append((x, cell))
        return x, (new, memory)
