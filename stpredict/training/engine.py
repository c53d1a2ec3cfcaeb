"""The training loop, the same for every model: data, steps, validation, logging, checkpoints, stopping."""

import hashlib
import logging
import math
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UsageError, UserError
from stpredict.config import differences
from stpredict.run import Progress, Run, now
from stpredict.training.checkpoint import CheckpointState, read_state, step_of
from stpredict.training.config import InitFromConfig, TrainingConfig
from stpredict.training.early_stopping import EarlyStopping
from stpredict.training.flops import ForwardFlops
from stpredict.training.guards import ADVICE
from stpredict.training.histograms import KINDS, histograms
from stpredict.training.initial import initialise
from stpredict.training.learner import Learner
from stpredict.training.log_line import log_line
from stpredict.training.logger import MetricsLogger
from stpredict.training.meter import Meter
from stpredict.training.profiling import Profiler
from stpredict.training.ranks import Ranks
from stpredict.training.restoring import named, newest_sound_checkpoint, restore
from stpredict.training.saving import Saver
from stpredict.training.signals import AGAIN, Preempted, StopRequest
from stpredict.training.task import Batch, Share, Task
from stpredict.training.wandb_sink import WandbSink, check_wandb
from stpredict.training.watchdog import Watchdog

log = logging.getLogger(__name__)


class Trainer:
    """Trains ``task`` to ``training.steps`` and leaves a complete checkpoint of the last step.

    ``identity`` holds the settings, by dotted keys, that decide the weights: a checkpoint saved under others is refused
    unless ``force``. A run without a checkpoint begins at the weights of ``init_from``. ``after_stop`` is called where
    signals asked for a stop, on rank 0, with those it got, when all is saved and before any rank leaves; it returns in
    words what happens next.
    """

    def __init__(
        self,
        task: Task,
        training: TrainingConfig,
        run: Run,
        ranks: Ranks,
        identity: dict[str, Any],
        seed: int,
        force: bool = False,
        init_from: InitFromConfig | None = None,
        after_stop: Callable[[Collection[Signals]], str] = lambda _: AGAIN,
    ):
        self.task, self.training, self.run, self.ranks, self.force = task, training, run, ranks, force
        self.after_stop = after_stop
        self.init_from = init_from
        self.step = 0
        self.watchdog = Watchdog(run, ranks, training.guards.hang_timeout_s)
        self._at("building the model's engine")
        self._check_metric_names()
        self.stopping = EarlyStopping(training.early_stopping) if training.early_stopping else None
        if training.wandb and ranks.is_main:
            check_wandb(training.wandb)
        flops = ForwardFlops(task)  # of the model before DeepSpeed splits it
        self.learner = Learner(task, training, ranks, self._at)
        self.engine = self.learner.engine
        self.meter = Meter(task, training, self.learner, ranks, flops)
        self.share = Share(ranks.rank, ranks.size, training.batch_size // (ranks.size * self.learner.accumulation))
        self.identity = {**identity, "training.precision": self.learner.precision}
        self.saver = Saver(run.checkpoints, self.learner.owned, training.checkpoint, ranks, self.watchdog.tick)
        self.seed = seed
        self.saved_step = -1
        self.validated: tuple[int, dict[str, float]] = (-1, {})  # the last validation's step and metrics
        self.consumed: dict[str, int] = {}  # samples behind the weights, of each set
        self.replaced = self.replaced_before = 0  # samples drawn that could not be read; earlier starts' on rank 0
        self.unequal_buffers: set[str] = set()
        self._begin()

    def train(self) -> None:
        """Runs the remaining steps. Raises Preempted after saving, where a signal asked to stop."""
        training, ranks = self.training, self.ranks
        batches = self.task.training_batches(self.share, self.consumed)
        logger = self._logger() if ranks.is_main else None
        progress = Progress(self.run, training.steps, "step") if ranks.is_main else None
        log.info("%s", self.learner.summary())
        if ranks.is_main:
            log.info("times, throughput, memory and the rest: %s and TensorBoard", self.run.metrics_path)
        self.engine.train()
        meter = self.meter
        meter.clock.restart()
        profiler = Profiler(self.run, training.profile, ranks)
        with ExitStack() as stack:
            stack.callback(self.watchdog.stop)
            stack.enter_context(closing(batches))
            stack.enter_context(closing(profiler))
            if logger:
                stack.callback(lambda: logger.close())  # the one that is there at the end
            stop = stack.enter_context(StopRequest())
            while self.step < training.steps and not (self.stopping and self.stopping.over):
                self._at("waiting for data")
                micro_batches = [self._to_device(batch) for batch in batches.draw(self.step, self.learner.accumulation)]
                meter.data_ready(micro_batches)
                self._at("agreeing on the step")
                profiled = profiler.wanted(self.step + 1)
                counts, stopping, written, profiled = self._agree(micro_batches, bool(stop), profiled)
                if written:
                    self._finish_save()
                if stopping:
                    self._save(last=True)
                    self._leave_preempted(stop.received)
                if profiled:
                    profiler.start(self.step + 1, profiled)
                sums = self.learner.step(self.step, micro_batches, counts)
                self.step += 1
                self.consumed = dict(batches.consumed)
                self.replaced = self.replaced_before + batches.replaced
                meter.step_done(sums)
                if profiler.step_done(self.step):
                    meter.skip()
                if self.learner.guards.must_roll_back:
                    self._roll_back()
                    meter.skip()
                    if logger:
                        logger.close()
                        logger = self._logger()
                    continue
                last = self.step == training.steps
                if self.step % training.log_every == 0 or last or self.step == 1:
                    self._at("logging")
                    for line in self.learner.stragglers.compare(meter.clock.waiting_s, meter.clock.elapsed_s):
                        log.log(logging.WARNING if ranks.is_main else logging.DEBUG, "step %d: %s", self.step, line)
                    values = meter.values(sums, counts, self.replaced)
                    if logger:
                        logger.scalars("train", self.step, values)
                        shown = {
                            name: values[name]
                            for name in ("loss", "samples_per_s", "mfu")
                            if math.isfinite(values.get(name, math.nan))
                        }
                        progress.update(self.step, "training", **shown)
                        log.info("step %d/%d  %s", self.step, training.steps, log_line(values, counts))
                elif progress:
                    progress.update(self.step, "training")
                if self.step % training.validate_every == 0 or last:
                    self._validate(logger, progress)
                    meter.skip()
                    last = last or bool(self.stopping and self.stopping.over)
                if self.step % training.picture_every == 0 or last:
                    self._picture(logger)
                    meter.skip()
                if training.histogram_every and (self.step % training.histogram_every == 0 or last):
                    self._histograms(logger)
                    meter.skip()
                # Not amid bad steps: what they may lead back to shall be from before them.
                if last or (self.step % training.checkpoint.every == 0 and not self.learner.guards.state.bad_in_a_row):
                    if logger:
                        logger.flush()  # a killed run begins again here and logs only what comes after
                    if last and progress:
                        progress.update(self.step, "saving")
                    self._save(last)
                    meter.skip()
            self.saver.close()
        if self.step < training.steps:
            log.info("step %d/%d  training ends here: %s", self.step, training.steps, self.stopping.reason)
            if ranks.is_main:
                self.run.update_status(note=f"stopped at step {self.step} of {training.steps}: {self.stopping.reason}")

    def _logger(self) -> MetricsLogger:
        config = self.training.wandb
        return MetricsLogger(self.run, self.step, WandbSink(self.run, config, self.identity) if config else None)

    def _check_metric_names(self) -> None:
        """UsageError where a metric is to be watched that validation does not give."""
        training = self.training
        for key, watched in (
            ("checkpoint.best", training.checkpoint.best),
            ("early_stopping", training.early_stopping),
        ):
            if watched and watched.metric not in self.task.metrics:
                raise UsageError(
                    f"training.{key}.metric {watched.metric!r} is no metric of this validation; "
                    f"there are {', '.join(self.task.metrics)}"
                )

    def _agree(self, micro_batches: list[Batch], stop: bool, profiled: int) -> tuple[dict[str, float], bool, bool, int]:
        """Every term's count over all micro-batches and ranks, whether any rank was asked to stop, whether all have
        written what is being saved, and how many steps rank 0 wants to have ``profiled``."""
        counts: dict[str, float] = {}
        for batch in micro_batches:
            for name, count in self.task.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        writing = self.saver.is_writing and not self.saver.is_written
        flags = [float(stop), float(writing), float(profiled)]
        *sums, stops, writers, profiled = self.ranks.sum(
            torch.tensor([*counts.values(), *flags], dtype=torch.float64)
        ).tolist()
        return dict(zip(counts, sums, strict=True)), stops > 0, self.saver.is_writing and writers == 0, int(profiled)

    def _check_finite(self) -> None:
        """UserError, on all ranks, before anything is saved that is not finite. Skipped steps leave no trace, so this
        is a model or an optimizer that made it out of what is."""
        if keys := self.learner.not_finite():
            raise UserError(
                f"{self.run.path}: the state of step {self.step} is not finite and not saved: "
                f"{'; '.join(named('', keys)).strip()}; lower training.optimizer.lr or lengthen the warm-up"
            )

    def _leave_preempted(self, received: Collection[Signals]) -> None:
        """Says so in status.json, and has the job requeued, before any rank ends: the first may take the others with
        it."""
        stopped, then = f"stopped at step {self.step} of {self.training.steps}", AGAIN
        if self.ranks.is_main:
            self.run.update_status(state="preempted", step=self.step, finished=now(), error=f"{stopped}; {then}")
            then = self.after_stop(received)
        self.ranks.barrier()
        raise Preempted(f"{stopped}; {then}")

    def _validate(self, logger: MetricsLogger | None, progress: Progress | None) -> None:
        totals: dict[str, torch.Tensor] = {}
        with self._evaluating():
            for number, batch in enumerate(self.task.validation_batches(self.share)):
                if progress and number % 8 == 0:
                    progress.update(self.step, "validating")
                self._at("validating")
                for name, value in self.task.validation_step(self.engine, self._to_device(batch)).items():
                    totals[name] = totals.get(name, 0) + value.double().cpu()
        metrics = self.task.validation_metrics({name: self.ranks.sum(total) for name, total in totals.items()})
        assert set(self.task.metrics) <= metrics.keys(), "a task gives the metrics that it names"
        self.validated = (self.step, metrics)
        if self.stopping:
            self.stopping.judge(self.step, metrics)
        if logger:
            logger.scalars("val", self.step, metrics)
            log.info("step %d/%d  validation  %s", self.step, self.training.steps, _as_text(metrics))

    def _picture(self, logger: MetricsLogger | None) -> None:
        self._at("making a picture")
        with self._evaluating():
            batch = self._to_device(next(iter(self.task.validation_batches(self.share))))
            frames = self.task.picture(self.engine, batch)
        if logger:
            logger.picture("val/picture", self.step, frames)

    def _histograms(self, logger: MetricsLogger | None) -> None:
        keys = [
            f"{part.module}/{kind}/{name}"
            for part in self.learner.held
            for kind in KINDS
            for name, parameter in part.model.named_parameters()
            if parameter.requires_grad
        ]
        found = histograms(self.learner.owned(), keys, self.ranks)
        if logger:
            for key, histogram in found.items():
                logger.histogram(key, self.step, histogram)

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

    def _state(self) -> CheckpointState:
        step, metrics = self.validated
        return CheckpointState(
            step=self.step,
            samples_consumed=self.consumed,
            samples_replaced=int(self.ranks.sum(torch.tensor(self.replaced)).item()),
            quarantined=self.task.quarantined,
            world_size=self.ranks.size,
            zero_stage=self.training.zero_stage,
            precision=self.learner.precision,
            loss_scale=self.learner.loss_scale.state() if self.learner.loss_scale else None,
            optimizer_steps=self.learner.optimizer_steps(),
            config=self.identity,
            metrics=metrics if step == self.step else {},
            waiting=self.stopping and self.stopping.waiting,
            guards=self.learner.guards.state.model_copy(deep=True),
            export=self.task.export_config().model_copy(update={"step": self.step}).model_dump(mode="json"),
        )

    def _save(self, last: bool = False) -> None:
        """Begins to save this step, in the background if so configured; if it is the ``last``, ends it too."""
        self._at("saving")
        self._finish_save(must=last and self.step == self.saved_step, due=None if last else self.step)
        if self.step == self.saved_step:
            return
        self._check_finite()
        self._check_buffers()
        for found in self.ranks.gather(self.task.quarantined):
            self.task.quarantined.update(found)
        with self._failing_as_configured(must=last):
            self.saver.start(self._state())
            self.saved_step = self.step
            if last:
                self.saver.finish()

    def _check_buffers(self) -> None:
        """Says, once, which buffers differ between ranks: a checkpoint holds one rank's, so that a continued training
        would not equal an uninterrupted one."""
        pieces = [piece for part in self.learner.held for piece in part.pieces() if piece.kind == "buffer"]
        sums = self.ranks.gather({piece.key: float(piece.tensor.double().sum()) for piece in pieces})
        unequal = {key for key in sums[0] if len({repr(of_rank[key]) for of_rank in sums}) > 1} - self.unequal_buffers
        if unequal:
            log.warning("buffers that differ between ranks, of which one is saved: %s", ", ".join(sorted(unequal)))
            self.unequal_buffers |= unequal

    def _finish_save(self, must: bool = False, due: int | None = None) -> None:
        self._at("finishing a save")
        with self._failing_as_configured(must):
            self.saver.finish(due)

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
            log.error("step %d: training goes on without a checkpoint: %s", self.step, error)

    def _begin(self) -> None:
        """Continues from the newest sound checkpoint; starts anew where there is none."""
        self._at("reading a checkpoint")
        checkpoint = newest_sound_checkpoint(self.run.checkpoints, self.ranks)
        if checkpoint is None:
            if self.init_from:
                initialise(self.learner.held[0], self.init_from, self.ranks)
            self._seed()
            if self.learner.ema:
                self.learner.ema.start()
            return
        if changes := differences(read_state(checkpoint).config, self.identity):
            if not self.force:
                raise UsageError(
                    f"{checkpoint}: was saved under another config ({', '.join(changes)}); use another `run`, "
                    "or --force to continue with the new one"
                )
            log.warning("%s: was saved under another config: %s", checkpoint, ", ".join(changes))
        state = self._return_to(checkpoint)
        self.consumed = state.samples_consumed
        self.replaced = self.replaced_before = state.samples_replaced if self.ranks.is_main else 0
        self.learner.guards.state = state.guards
        self.task.quarantined.update(state.quarantined)
        log.info("continuing from %s", checkpoint)
        if self.ranks.is_main:
            self.run.update_status(continued_from=self.step)

    def _return_to(self, checkpoint: Path) -> CheckpointState:
        """Everything that training changes becomes what it was at the checkpoint; the position in the data stays."""
        state = restore(checkpoint, self.learner.held, self.learner.averages, self.ranks)
        if self.learner.loss_scale and state.loss_scale:
            self.learner.loss_scale.restore(state.loss_scale)
        self.step = self.saved_step = state.step
        self.validated = (-1, {})
        self.saver.continue_from(checkpoint)
        if self.stopping:
            self.stopping.go_on_from(state.waiting)
        if state.world_size != self.ranks.size:
            log.info("it was saved by %d ranks: random states begin anew", state.world_size)
            self._seed()
        return state

    def _roll_back(self) -> None:
        """After too many bad steps: back to the newest sound checkpoint, but on with the data that comes now. A run
        that is killed before it saves again comes here again, from the same checkpoint by the same steps."""
        guards, step = self.learner.guards, self.step
        self._finish_save()
        self._at("going back to a checkpoint")
        checkpoint = newest_sound_checkpoint(self.run.checkpoints, self.ranks)
        if checkpoint is None:
            raise UserError(f"{self.run.path}: {guards.why()}, up to step {step}, and no checkpoint is there; {ADVICE}")
        guards.rolled_back(read_state(checkpoint).guards, step_of(checkpoint))
        self._return_to(checkpoint)
        log.warning("step %d: back to %s, and on with the data after what has been seen", step, checkpoint)

    def _at(self, phase: str) -> None:
        self.watchdog.mark(self.step, phase)

    def _seed(self) -> None:
        """From here on each rank drops out its own units; not those of an earlier start."""
        place = (self.seed, self.step, self.ranks.size, self.ranks.rank)
        seed = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        return {
            key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }


def _as_text(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
