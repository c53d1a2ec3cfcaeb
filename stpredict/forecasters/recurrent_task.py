"""Training a recurrent forecaster: of every frame, the next one."""

from collections.abc import Mapping

from torch import Tensor

from stpredict.forecasters.scheduled_sampling import WithShownFrames
from stpredict.forecasters.simvp import Forecast
from stpredict.forecasters.task import ForecasterTask
from stpredict.training.task import Batch, Forward, Share, TrainingBatches


class RecurrentTask(ForecasterTask):
    """The loss is over all frames but the first, those that are given too, as published. Validation and pictures are of
    the output frames, which the model predicts from the input frames alone."""

    def training_batches(self, share: Share, consumed: Mapping[str, int]) -> TrainingBatches:
        return WithShownFrames(super().training_batches(share, consumed), self.model.config, self.seed)

    @property
    def learned_frames(self) -> int:
        return self.model.config.input_frames + self.model.config.output_frames - 1

    def learned(self, forward: Forward, batch: Batch) -> tuple[Forecast, Tensor]:
        video = self.training_scaling.scaled(batch["clip"])
        return forward(video[:, :, :-1], batch["shown"]), video[:, :, 1:]
