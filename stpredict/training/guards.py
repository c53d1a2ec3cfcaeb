"""What is done about steps that went wrong: they are skipped and counted, and after too many the training goes back to
a checkpoint. Torch-free.

Everything here is decided by numbers that all ranks have alike, so that all decide alike, and is saved in checkpoints,
so that a resumed training does too.
"""

import logging
from math import isfinite
from statistics import median

from pydantic import BaseModel

from data_pipeline.errors import UserError
from stpredict.training.config import GuardsConfig, SpikeConfig

log = logging.getLogger(__name__)
FEWEST = 10  # losses from which the usual one can be told
TO_SIGMA = 1.4826  # from the median absolute deviation of a normal distribution to its standard deviation


class GuardState(BaseModel):
    """What of the guards a checkpoint keeps. ``losses`` are the last finite ones, for the spike detector."""

    # A loss is written with all its digits; NaN and Infinity are never among them.
    steps_skipped: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    losses: list[float] = []


class Guards:
    """Judges every step of a training."""

    def __init__(self, config: GuardsConfig, warning: int = logging.WARNING):
        self.config, self.warning = config, warning  # the level of what is said
        self.state = GuardState()
        self._loss, self._why = 0.0, ""
        self._returns = (-1, 0)  # the step of the checkpoint last gone back to, and how often in succession

    def refuses(self, step: int, loss: float, finite: bool) -> bool:
        """Whether ``step``, from 0, of this loss over all ranks, must change nothing; ``finite``: what else it computed
        is."""
        self._loss = loss
        if not isfinite(loss):
            self._why = f"its loss is {loss}"
            return True
        if not finite:
            self._why = "a loss or gradient of the discriminator is not finite"
            return True
        spike = self.config.spike
        if spike is not None and self._is_spike(step, loss, spike) and spike.action == "skip":
            self._why = "its loss is a spike"
            return True
        self._why = "its gradient is not finite"  # if it is skipped all the same
        return False

    def took(self, step: int, applied: bool) -> None:
        """Counts a step that changed the weights, or was skipped."""
        state = self.state
        if not applied:
            state.steps_skipped += 1
            state.bad_in_a_row += 1
            log.log(self.warning, "step %d was skipped: %s (%d in a row)", step + 1, self._why, state.bad_in_a_row)
            return
        state.bad_in_a_row = 0
        if self.config.spike:
            state.losses = [*state.losses, self._loss][-self.config.spike.window :]

    def _is_spike(self, step: int, loss: float, config: SpikeConfig) -> bool:
        losses = self.state.losses
        if len(losses) < FEWEST:
            return False
        usual = median(losses)
        deviation = TO_SIGMA * median(abs(value - usual) for value in losses)
        # Where losses hardly differ, rounding would do: a thousandth of the loss is no spike.
        far = usual + config.threshold * max(deviation, 1e-3 * abs(usual))
        if not loss > far > usual:  # of losses that all are 0 nothing can be told
            return False
        said = "step %d: its loss of %.4g is a spike; usual are %.4g, and up to %.4g"
        log.log(self.warning, said, step + 1, loss, usual, far)
        return True

    @property
    def must_roll_back(self) -> bool:
        return self.state.bad_in_a_row >= self.config.max_bad_steps

    def why(self) -> str:
        return f"{self.state.bad_in_a_row} steps in a row {BAD}"

    def rolled_back(self, state: GuardState, step: int) -> None:
        """The training is at ``step`` again, as a checkpoint with ``state`` has it. UserError where that has not helped
        before."""
        checkpoint, times = self._returns
        times = times + 1 if checkpoint == step else 1
        if times > self.config.max_rollbacks:
            raise UserError(
                f"{self.why()}, for the {times}. time since the checkpoint of step {step}; {ADVICE}, or raise "
                "training.guards.max_rollbacks"
            )
        self._returns = (step, times)
        self.state = state.model_copy(
            update={
                "steps_skipped": self.state.steps_skipped,
                "rollbacks": self.state.rollbacks + 1,
                "bad_in_a_row": 0,
            }
        )


BAD = "had a loss or gradient that is not finite or a spike"
NOT_SAVED = "is not finite and not saved"
GIVEN_UP = (BAD, NOT_SAVED)  # one of which is said by a training that failed since it diverged
ADVICE = "look at the data there, lower training.optimizer.lr or lengthen the warm-up"
