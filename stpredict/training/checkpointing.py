"""Where a training stands: saved, continued from, and gone back to."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UsageError, UserError
from stpredict.config import differences
from stpredict.run import Run
from stpredict.training.checkpoint import CheckpointState, read_state, step_of
from stpredict.training.config import InitFromConfig, TrainingConfig
from stpredict.training.early_stopping import EarlyStopping
from stpredict.training.guards import ADVICE, NOT_SAVED
from stpredict.training.initial import initialise
from stpredict.training.learner import Learner
from stpredict.training.ranks import Ranks
from stpredict.training.restoring import named, newest_sound_checkpoint, restore
from stpredict.training.saving import Saver
from stpredict.training.task import Task

log = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a training has come, besides what the learner holds."""

    step: int = 0
    consumed: dict[str, int] = field(default_factory=dict)  # samples behind the weights, of each set
    replaced: int = 0  # samples drawn that could not be read; those of earlier starts count on rank 0
    validated: tuple[int, dict[str, float]] = (-1, {})  # the last validation's step and metrics


class Checkpointing:
    """Of a training that is at ``position``, which continuing and going back change; on all ranks alike. ``at`` is told
    what is being done, ``working`` that it goes on.

    ``identity`` holds the settings, by dotted keys, that decide the weights: a checkpoint saved under others is refused
    unless forced to.
    """

    def __init__(
        self,
        task: Task,
        training: TrainingConfig,
        run: Run,
        learner: Learner,
        ranks: Ranks,
        position: Position,
        stopping: EarlyStopping | None,
        identity: dict[str, Any],
        seed: int,
        at: Callable[[str], None],
        working: Callable[[], None],
    ):
        self.task, self.training, self.run, self.learner, self.ranks = task, training, run, learner, ranks
        self.position, self.stopping, self.identity, self.seed = position, stopping, identity, seed
        self.at, self.working = at, working
        self.saver = Saver(run.checkpoints, learner.owned, training.checkpoint, ranks, working)
        self.saved_step = -1
        self.unequal_buffers: set[str] = set()

    def begin(self, force: bool, init_from: InitFromConfig | None) -> None:
        """Continues from the newest sound checkpoint; starts anew where there is none."""
        self.at("reading a checkpoint")
        checkpoint = newest_sound_checkpoint(self.run.checkpoints, self.ranks, self.working)
        if checkpoint is None:
            if init_from:
                initialise(self.learner.held[0], init_from, self.ranks, self.working)
            self._seed()
            if self.learner.ema:
                self.learner.ema.start()
            return
        if changes := differences(read_state(checkpoint).config, self.identity):
            if not force:
                raise UsageError(
                    f"{checkpoint}: was saved under another config ({', '.join(changes)}); use another `run`, "
                    "or --force to continue with the new one"
                )
            said = "%s: was saved under another config: %s"
            log.log(self.ranks.warning, said, checkpoint, ", ".join(changes))
        state = self._return_to(checkpoint)
        self.position.consumed = state.samples_consumed
        self.position.replaced = state.samples_replaced if self.ranks.is_main else 0
        self.learner.guards.state = state.guards
        self.task.quarantined.update(state.quarantined)
        log.info("continuing from %s", checkpoint)
        if self.ranks.is_main:
            self.run.update_status(continued_from=state.step)

    def save(self, last: bool = False) -> None:
        """Begins to save this step, in the background if so configured; if it is the ``last``, ends it too."""
        step = self.position.step
        self.at("saving")
        self.finish(must=last and step == self.saved_step, due=None if last else step)
        if step == self.saved_step:
            return
        self._check_finite()
        self._check_buffers()
        for found in self.ranks.gather(self.task.quarantined):
            self.task.quarantined.update(found)
        with self._failing_as_configured(must=last):
            self.saver.start(self._state())
            self.saved_step = step
            if last:
                self.saver.finish()

    def finish(self, must: bool = False, due: int | None = None) -> None:
        """Ends the save that is going on, if one is."""
        self.at("finishing a save")
        with self._failing_as_configured(must):
            self.saver.finish(due)

    def roll_back(self) -> None:
        """After too many bad steps: back to the newest sound checkpoint, but on with the data that comes now. A run
        that is killed before it saves again comes here again, from the same checkpoint by the same steps."""
        guards, step = self.learner.guards, self.position.step
        self.finish()
        self.at("going back to a checkpoint")
        checkpoint = newest_sound_checkpoint(self.run.checkpoints, self.ranks, self.working)
        if checkpoint is None:
            raise UserError(f"{self.run.path}: {guards.why()}, up to step {step}, and no checkpoint is there; {ADVICE}")
        guards.rolled_back(read_state(checkpoint).guards, step_of(checkpoint))
        self._return_to(checkpoint)
        said = "step %d: back to %s, and on with the data after what has been seen"
        log.log(self.ranks.warning, said, step, checkpoint)

    def _return_to(self, checkpoint: Path) -> CheckpointState:
        """Everything that training changes becomes what it was at the checkpoint; the position in the data stays."""
        state = restore(checkpoint, self.learner.held, self.learner.averages, self.ranks, self.working)
        if self.learner.loss_scale and state.loss_scale:
            self.learner.loss_scale.restore(state.loss_scale)
        self.position.step = self.saved_step = state.step
        self.position.validated = (-1, {})
        self.saver.continue_from(checkpoint)
        if self.stopping:
            self.stopping.go_on_from(state.waiting)
        if state.world_size != self.ranks.size:
            log.info("it was saved by %d ranks: random states begin anew", state.world_size)
            self._seed()
        return state

    def _state(self) -> CheckpointState:
        position, learner = self.position, self.learner
        validated, metrics = position.validated
        return CheckpointState(
            step=position.step,
            samples_consumed=position.consumed,
            samples_replaced=int(self.ranks.sum(torch.tensor(position.replaced)).item()),
            quarantined=self.task.quarantined,
            world_size=self.ranks.size,
            zero_stage=self.training.zero_stage,
            precision=learner.precision,
            loss_scale=learner.loss_scale.state() if learner.loss_scale else None,
            optimizer_steps=learner.optimizer_steps(),
            config=self.identity,
            metrics=metrics if validated == position.step else {},
            waiting=self.stopping and self.stopping.waiting,
            guards=learner.guards.state.model_copy(deep=True),
            export=self.task.export_config().model_copy(update={"step": position.step}).model_dump(mode="json"),
        )

    def _check_finite(self) -> None:
        """UserError, on all ranks, before anything is saved that is not finite. Skipped steps leave no trace, so this
        is a model or an optimizer that made it out of what is."""
        if keys := self.learner.not_finite():
            raise UserError(
                f"{self.run.path}: the state of step {self.position.step} {NOT_SAVED}: "
                f"{'; '.join(named('', keys)).strip()}; lower training.optimizer.lr or lengthen the warm-up"
            )

    def _check_buffers(self) -> None:
        """Says, once, which buffers differ between ranks: a checkpoint holds one rank's, so that a continued training
        would not equal an uninterrupted one."""
        pieces = [piece for part in self.learner.held for piece in part.pieces() if piece.kind == "buffer"]
        sums = self.ranks.gather({piece.key: float(piece.tensor.double().sum()) for piece in pieces})
        unequal = {key for key in sums[0] if len({repr(of_rank[key]) for of_rank in sums}) > 1} - self.unequal_buffers
        if unequal:
            said = "buffers that differ between ranks, of which one is saved: %s"
            log.log(self.ranks.warning, said, ", ".join(sorted(unequal)))
            self.unequal_buffers |= unequal

    @contextmanager
    def _failing_as_configured(self, must: bool) -> Iterator[None]:
        """A checkpoint that cannot be written ends the training or, if so configured, is done without; where it
        ``must`` be written there is no choice."""
        try:
            yield
        except UserError as error:
            self.saved_step = -1
            if must or self.training.checkpoint.on_failure == "stop":
                raise
            log.error("step %d: training goes on without a checkpoint: %s", self.position.step, error)

    def _seed(self) -> None:
        """From here on each rank drops out its own units; not those of an earlier start."""
        place = (self.seed, self.position.step, self.ranks.size, self.ranks.rank)
        seed = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
