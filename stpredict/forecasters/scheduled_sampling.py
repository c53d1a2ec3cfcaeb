"""Which true frames a recurrent forecaster sees: scheduled sampling (Bengio et al. 2015, arXiv:1506.03099)."""

import numpy as np
import torch

from data_pipeline.seeding import generator
from stpredict.forecasters.config import RecurrentConfig
from stpredict.training.drawn import Drawn
from stpredict.training.task import Batch, TrainingBatches


class WithShownFrames(Drawn):
    """Training batches with ``shown``, bool ``(b, output_frames - 1)``: of each output frame but the last, whether the
    model sees it as it is. A function of seed, step and key."""

    def __init__(self, batches: TrainingBatches, config: RecurrentConfig, seed: int):
        super().__init__(batches)
        self._config, self._seed = config, seed

    def add(self, step: int, batch: Batch) -> None:
        frames, share = self._config.output_frames - 1, self._config.scheduled_sampling.share(step)
        chances = [generator("scheduled sampling", self._seed, step, key).random(frames) for key in batch["key"]]
        batch["shown"] = torch.from_numpy(np.stack(chances) < share)
