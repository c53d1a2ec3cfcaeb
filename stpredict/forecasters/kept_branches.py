"""Which residual branches of a translator see a training sample: drop path, drawn with the batch."""

import numpy as np
import torch

from data_pipeline.seeding import generator
from stpredict.forecasters.simvp import SimVP
from stpredict.layers.drop_path import kept
from stpredict.training.drawn import Drawn
from stpredict.training.task import Batch, TrainingBatches


class WithKeptBranches(Drawn):
    """Training batches with ``kept``, fp32 ``(b, passes, branches)``, for SimVP's forward pass. A function of seed,
    step and key: the loss does not depend on the ranks, and layers that are computed again leave out the same."""

    def __init__(self, batches: TrainingBatches, model: SimVP, seed: int):
        super().__init__(batches)
        self._passes, self._rates, self._seed = model.passes, model.drop_rates, seed

    def add(self, step: int, batch: Batch) -> None:
        size = self._passes, len(self._rates)
        chances = [generator("drop path", self._seed, step, key).random(size, np.float32) for key in batch["key"]]
        batch["kept"] = kept(self._rates, torch.from_numpy(np.stack(chances)))
