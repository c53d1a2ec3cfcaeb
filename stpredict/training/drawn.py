"""What is drawn with the training batches: so that counts know it before the forward pass."""

from abc import ABC, abstractmethod

from stpredict.training.task import Batch, TrainingBatches


class Drawn(ABC):
    """``batches``, to each of which something is added."""

    def __init__(self, batches: TrainingBatches):
        self._batches = batches

    @property
    def consumed(self) -> dict[str, int]:
        return self._batches.consumed

    @property
    def replaced(self) -> int:
        return self._batches.replaced

    def draw(self, step: int, count: int) -> list[Batch]:
        batches = self._batches.draw(step, count)
        for batch in batches:
            self.add(step, batch)
        return batches

    @abstractmethod
    def add(self, step: int, batch: Batch) -> None:
        """To a batch of training step ``step``. What is random is a function of seed, step and key of the sample, not
        of how ranks split the batch."""

    def close(self) -> None:
        self._batches.close()
