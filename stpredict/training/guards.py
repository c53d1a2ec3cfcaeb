"""What is done about steps that went wrong: they are skipped and counted. Torch-free."""

from math import isfinite

from pydantic import BaseModel


class GuardState(BaseModel):
    """What of the guards a checkpoint keeps, so that a resumed training decides as an uninterrupted one."""

    steps_skipped: int = 0
    bad_in_a_row: int = 0


class Guards:
    """Judges every step of a training by numbers that all ranks have alike, so that all decide alike."""

    def __init__(self):
        self.state = GuardState()

    def refuses(self, loss: float, finite: bool) -> bool:
        """Whether a step of this loss, over all ranks, must change nothing; ``finite``: what else it computed is."""
        return not (isfinite(loss) and finite)

    def took(self, applied: bool) -> None:
        """Counts a step that changed the weights, or was skipped."""
        self.state.steps_skipped += not applied
        self.state.bad_in_a_row = 0 if applied else self.state.bad_in_a_row + 1
