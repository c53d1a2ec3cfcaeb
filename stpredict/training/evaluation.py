"""What a training looks at between steps: validation, a picture, histograms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from stpredict.training.config import TrainingConfig
from stpredict.training.histograms import KINDS, Histogram, histograms
from stpredict.training.learner import Learner
from stpredict.training.ranks import Ranks
from stpredict.training.task import Share, Task, to_device


class Evaluation:
    """Of the model as it is, on all ranks alike. ``at`` is told what is being done."""

    def __init__(
        self,
        task: Task,
        training: TrainingConfig,
        learner: Learner,
        ranks: Ranks,
        share: Share,
        at: Callable[[str], None],
    ):
        self.task, self.training, self.learner, self.ranks, self.share = task, training, learner, ranks, share
        self.engine, self.at = learner.engine, at

    def validate(self, working: Callable[[], None]) -> dict[str, float]:
        """The metrics, the same on every rank. ``working`` is called now and then."""
        totals: dict[str, torch.Tensor] = {}
        with self._evaluating():
            for number, batch in enumerate(self.task.validation_batches(self.share)):
                if number % 8 == 0:
                    working()
                self.at("validating")
                for name, value in self.task.validation_step(self.engine, to_device(batch, self.ranks.device)).items():
                    totals[name] = totals.get(name, 0) + value.double().cpu()
        metrics = self.task.validation_metrics({name: self.ranks.sum(total) for name, total in totals.items()})
        metrics = self.ranks.from_main(metrics)  # to the bit: whether to stop hangs on it
        assert set(self.task.metrics) <= metrics.keys(), "a task gives the metrics that it names"
        return metrics

    def picture(self) -> np.ndarray:
        """Frames uint8 (t, h, w, 3)."""
        self.at("making a picture")
        with self._evaluating():
            batch = to_device(next(iter(self.task.validation_batches(self.share))), self.ranks.device)
            return self.task.picture(self.engine, batch)

    def histograms(self) -> dict[str, Histogram]:
        """Of what is trained, by key."""
        keys = [
            f"{part.module}/{kind}/{name}"
            for part in self.learner.held
            for kind in KINDS
            for name, parameter in part.model.named_parameters()
            if parameter.requires_grad
        ]
        return histograms(self.learner.owned(), keys, self.ranks)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, of the averages if so configured, and training mode afterwards."""
        averages = self.learner.ema and self.training.validate_with == "averages"
        self.engine.eval()
        try:
            with torch.no_grad(), self.learner.averaged() if averages else nullcontext():
                yield
        finally:
            self.engine.train()
