"""The training loop, the same for every model: data, steps, validation, logging, checkpoints, stopping."""

import logging
import math
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from signal import Signals
from typing import Any

import torch

from data_pipeline.errors import UsageError
from stpredict.run import Progress, Run, now, write_atomically
from stpredict.training.checkpointing import Checkpointing, Position
from stpredict.training.config import InitFromConfig, TrainingConfig
from stpredict.training.early_stopping import EarlyStopping
from stpredict.training.evaluation import Evaluation
from stpredict.training.flops import ForwardFlops
from stpredict.training.learner import Learner
from stpredict.training.log_line import log_line
from stpredict.training.logger import MetricsLogger
from stpredict.training.meter import Meter
from stpredict.training.profiling import Profiler
from stpredict.training.ranks import Ranks
from stpredict.training.signals import AGAIN, Preempted, StopRequest
from stpredict.training.task import Batch, Share, Sums, Task, to_device
from stpredict.training.wandb_sink import WandbSink, check_wandb
from stpredict.training.watchdog import Watchdog

log = logging.getLogger(__name__)


class Trainer:
    """Trains ``task`` to ``training.steps`` and leaves a complete checkpoint of the last step.

    A checkpoint saved under another ``identity`` (``Checkpointing``) is refused unless ``force``. A run without a
    checkpoint begins at the weights of ``init_from``. ``after_stop`` is called where signals asked for a stop, on rank
    0, with those it got, when all is saved and before any rank leaves; it returns in words what happens next.
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
        self.task, self.training, self.run, self.ranks, self.after_stop = task, training, run, ranks, after_stop
        self.position = Position()
        self.watchdog = Watchdog(run, ranks, training.guards.hang_timeout_s)
        try:
            self._build(identity, seed, force, init_from)
        except BaseException:
            self.watchdog.stop()
            raise

    def _build(self, identity: dict[str, Any], seed: int, force: bool, init_from: InitFromConfig | None) -> None:
        task, training, run, ranks = self.task, self.training, self.run, self.ranks
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
        self.evaluation = Evaluation(task, training, self.learner, ranks, self.share, self._at)
        self.identity = {**identity, "training.precision": self.learner.precision}
        self.checkpointing = Checkpointing(
            task,
            training,
            run,
            self.learner,
            ranks,
            self.position,
            self.stopping,
            self.identity,
            seed,
            self._at,
            self.watchdog.tick,
        )
        self.saver = self.checkpointing.saver
        self.checkpointing.begin(force, init_from)
        self.replaced_before = self.position.replaced

    @property
    def step(self) -> int:
        """Steps made."""
        return self.position.step

    def train(self) -> None:
        """Runs the remaining steps. Raises Preempted after saving, where a signal asked to stop."""
        training, ranks, position, meter = self.training, self.ranks, self.position, self.meter
        batches = self.task.training_batches(self.share, position.consumed)
        self.logger = self._new_logger()
        self.progress = Progress(self.run, training.steps, "step") if ranks.is_main else None
        log.info("%s", self.learner.summary())
        if ranks.is_main:
            log.info("times, throughput, memory and the rest: %s and TensorBoard", self.run.metrics_path)
        self.engine.train()
        meter.restart()
        began = self.step
        profiler = Profiler(self.run, training.profile, ranks)
        with ExitStack() as stack:
            stack.callback(self.watchdog.stop)
            stack.enter_context(closing(batches))
            stack.enter_context(closing(profiler))
            stack.callback(lambda: self.logger and self.logger.close())  # the one that is there at the end
            stop = stack.enter_context(StopRequest())
            while self.step < training.steps and not self._stops_early:
                self._at("waiting for data")
                micro_batches = [to_device(b, ranks.device) for b in batches.draw(self.step, self.learner.accumulation)]
                meter.data_ready(micro_batches)
                self._at("agreeing on the step")
                profiled = profiler.wanted(self.step + 1)
                counts, stopping, written, profiled = self._agree(micro_batches, bool(stop), profiled)
                if written:
                    self.checkpointing.finish()
                if stopping:
                    self.checkpointing.save(last=True)
                    self._leave_preempted(stop.received, began)
                if profiled:
                    profiler.start(self.step + 1, profiled)
                sums = self.learner.step(self.step, micro_batches, counts)
                position.step += 1
                position.consumed = dict(batches.consumed)
                position.replaced = self.replaced_before + batches.replaced
                meter.step_done(sums)
                if profiler.step_done(self.step):
                    meter.skip()
                if self.learner.guards.must_roll_back:
                    profiler.close()
                    self._roll_back()
                    meter.restart()
                    continue
                last = self.step == training.steps
                if self.step % training.log_every == 0 or last or self.step == 1:
                    self._log(sums, counts)
                elif self.progress:
                    self.progress.update(self.step, "training")
                if self.step % training.validate_every == 0 or last:
                    self._validate()
                    meter.skip()
                    last = last or self._stops_early
                if self.step % training.picture_every == 0 or last:
                    self._picture()
                    meter.skip()
                if training.histogram_every and (self.step % training.histogram_every == 0 or last):
                    self._histograms()
                    meter.skip()
                # Not amid bad steps: what they may lead back to shall be from before them.
                if last or (self.step % training.checkpoint.every == 0 and not self.learner.guards.state.bad_in_a_row):
                    self._save(last)
                    meter.skip()
            self.saver.close()
        if self.step < training.steps:
            log.info("step %d/%d  training ends here: %s", self.step, training.steps, self.stopping.reason)
            if ranks.is_main:
                self.run.update_status(
                    step=self.step, note=f"stopped at step {self.step} of {training.steps}: {self.stopping.reason}"
                )

    @property
    def _stops_early(self) -> bool:
        return self.stopping is not None and self.stopping.over

    def _new_logger(self) -> MetricsLogger | None:
        """Of what comes after this step; on rank 0."""
        if not self.ranks.is_main:
            return None
        config = self.training.wandb
        return MetricsLogger(self.run, self.step, WandbSink(self.run, config, self.identity) if config else None)

    def _roll_back(self) -> None:
        self.checkpointing.roll_back()
        if self.logger:
            self.logger.close()
            self.logger = self._new_logger()

    def _log(self, sums: Sums, counts: dict[str, float]) -> None:
        self._at("logging")
        clock = self.meter.clock
        for line in self.learner.stragglers.compare(clock.waiting_s, clock.elapsed_s):
            log.log(self.ranks.warning, "step %d: %s", self.step, line)
        values = self.meter.values(sums, counts, self.position.replaced)
        if self.logger:
            write_atomically(self.run.scale_path, self.meter.scale.model_dump_json(indent=1) + "\n")
            self.logger.scalars("train", self.step, values)
            shown = {name: values[name] for name in ("loss", "samples_per_s", "mfu") if name in values}
            shown = {name: value for name, value in shown.items() if math.isfinite(value)}
            self.progress.update(self.step, "training", **shown)
            log.info("step %d/%d  %s", self.step, self.training.steps, log_line(values, counts))

    def _validate(self) -> None:
        progress = self.progress
        metrics = self.evaluation.validate(lambda: progress and progress.update(self.step, "validating"))
        self.position.validated = (self.step, metrics)
        if self.stopping:
            self.stopping.judge(self.step, metrics)
        if self.logger:
            self.logger.scalars("val", self.step, metrics)
            log.info("step %d/%d  validation  %s", self.step, self.training.steps, _as_text(metrics))

    def _picture(self) -> None:
        frames = self.evaluation.picture()
        if self.logger:
            self.logger.picture("val/picture", self.step, frames)

    def _histograms(self) -> None:
        found = self.evaluation.histograms()
        if self.logger:
            for key, histogram in found.items():
                self.logger.histogram(key, self.step, histogram)

    def _save(self, last: bool) -> None:
        if self.logger:
            self.logger.flush()  # a killed run begins again here and logs only what comes after
        if last and self.progress:
            self.progress.update(self.step, "saving")
        self.checkpointing.save(last)

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

    def _leave_preempted(self, received: Collection[Signals], began: int) -> None:
        """Says so in status.json, and has the job requeued, before any rank ends: the first may take the others with
        it."""
        idle = " (no step in this start: it needs more time)" if self.step == began else ""
        stopped, then = f"stopped at step {self.step} of {self.training.steps}{idle}", AGAIN
        if self.ranks.is_main:
            self.run.update_status(state="preempted", step=self.step, finished=now(), error=f"{stopped}; {then}")
            then = self.after_stop(received)
        self.ranks.barrier()
        raise Preempted(f"{stopped}; {then}")

    def _at(self, phase: str) -> None:
        self.watchdog.mark(self.step, phase)


def _as_text(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
