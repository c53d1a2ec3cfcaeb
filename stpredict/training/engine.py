"""The training loop, the same for every model: data, steps, validation, logging, checkpoints, stopping."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from data_pipeline.errors import UsageError, UserError
from stpredict.run import Progress, Run, now
from stpredict.training.checkpoint import (
    CheckpointState,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import build_engine
from stpredict.training.logger import MetricsLogger
from stpredict.training.precision import resolve_precision
from stpredict.training.ranks import Ranks
from stpredict.training.schedule import learning_rate_factor
from stpredict.training.signals import Preempted, StopRequest
from stpredict.training.task import Batch, Share, Task

log = logging.getLogger(__name__)


def accumulation_steps(training: TrainingConfig, ranks: int) -> int:
    """Micro-batches per rank and step. UsageError where the batch does not divide, naming sizes that do."""
    per_rank = training.batch_size // ranks
    if training.batch_size % ranks:
        near = sorted({max(1, per_rank) * ranks, (per_rank + 1) * ranks})
        raise UsageError(
            f"training.batch_size {training.batch_size} does not divide among {ranks} ranks; "
            f"{' or '.join(map(str, near))} would"
        )
    micro = training.micro_batch_size or per_rank
    if per_rank % micro:
        raise UsageError(
            f"training.micro_batch_size {micro} does not divide the {per_rank} samples that each of {ranks} ranks "
            f"gets of batch_size {training.batch_size}"
        )
    return per_rank // micro


class Trainer:
    """Trains ``task`` to ``training.steps`` and leaves a complete checkpoint of the last step."""

    def __init__(self, task: Task, training: TrainingConfig, run: Run, ranks: Ranks, config_hash: str, seed: int):
        self.task, self.training, self.run, self.ranks = task, training, run, ranks
        self.accumulation = accumulation_steps(training, ranks.size)
        self.dtype = resolve_precision(training.precision, ranks.device, training.zero_stage)
        self.share = Share(ranks.rank, ranks.size, training.batch_size // (ranks.size * self.accumulation))
        self.engine = build_engine(task.model, training, self.dtype, ranks.size, self.accumulation)
        self.config_hash = config_hash
        torch.manual_seed(seed * ranks.size + ranks.rank)  # from here on each rank drops out its own units
        self.step = 0
        self.saved_step = -1
        self.consumed: dict[str, int] = {}  # samples behind the weights, of each set
        # Counted where the loss is and read when values are logged, so that no step waits for a GPU.
        self.non_finite = torch.zeros((), device=ranks.device)
        self._resume()

    def train(self) -> None:
        """Runs the remaining steps. Raises Preempted after saving, where a signal asked to stop."""
        training, ranks = self.training, self.ranks
        batches = self.task.training_batches(self.share, self.consumed)
        logger = MetricsLogger(self.run, self.step) if ranks.is_main else None
        progress = Progress(self.run, training.steps, "step") if ranks.is_main else None
        log.info("%s", self._summary())
        self.engine.train()
        clock = StepClock()
        with closing(batches), StopRequest() as stop:
            while self.step < training.steps:
                micro_batches = [self._to_device(batch) for batch in batches.draw(self.step, self.accumulation)]
                clock.data_ready()
                counts, stopping = self._agree(micro_batches, bool(stop))
                if stopping:
                    self._save()
                    self._leave_preempted()
                sums = self._optimizer_step(micro_batches, counts)
                self.consumed = dict(batches.consumed)
                clock.step_done()
                last = self.step == training.steps
                saving = last or self.step % training.checkpoint.every == 0
                if self.step % training.log_every == 0 or last or self.step == 1:
                    values = self._training_values(sums, counts, clock)
                    if logger:
                        logger.scalars("train", self.step, values)
                        progress.update(self.step, "training", loss=values["loss"])
                        log.info("step %d/%d  %s", self.step, training.steps, _as_text(values))
                elif progress:
                    progress.update(self.step, "training")
                if saving:
                    self._save()
                    clock.restart()
                if self.step % training.validate_every == 0 or last:
                    self._validate(logger, progress)
                    clock.restart()
                if self.step % training.picture_every == 0 or last:
                    self._picture(logger)
                    clock.restart()
        if logger:
            logger.close()

    def _agree(self, micro_batches: list[Batch], stop: bool) -> tuple[dict[str, float], bool]:
        """Every term's count over all micro-batches and ranks, and whether any rank was asked to stop."""
        counts: dict[str, float] = {}
        for batch in micro_batches:
            for name, count in self.task.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        total = self.ranks.sum(torch.tensor([*counts.values(), float(stop)], dtype=torch.float64)).tolist()
        return dict(zip(counts, total[:-1], strict=True)), total[-1] > 0

    def _optimizer_step(self, micro_batches: list[Batch], counts: dict[str, float]) -> dict[str, torch.Tensor]:
        """Forward and backward of all micro-batches, one update. Returns this rank's sums of every term."""
        factor = learning_rate_factor(self.training.schedule, self.step, self.training.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.training.optimizer.lr * factor
        total: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            sums = self.task.training_step(self.engine, batch)
            loss = sum(weight * sums[name] / counts[name] for name, weight in self.task.weights.items())
            # DeepSpeed averages gradients over ranks; counts already span them, so the average is undone.
            self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            self.non_finite += ~loss.detach().isfinite()
            self.engine.step()
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value.detach()
        self.step += 1
        return total

    def _training_values(self, sums: dict, counts: dict[str, float], clock: "StepClock") -> dict[str, float]:
        self._check_finite()
        totals = self.ranks.sum(torch.stack([value.double().cpu() for value in sums.values()])).tolist()
        means = {name: total / counts[name] for name, total in zip(sums, totals, strict=True)}
        loss = sum(weight * means[name] for name, weight in self.task.weights.items())
        return {
            "loss": loss,
            **means,
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            **clock.values(self.training.batch_size),
        }

    def _check_finite(self) -> None:
        """UserError, on all ranks, where a loss or gradient was not finite since the last look: before values are
        believed, and before weights are saved."""
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        bad = self.non_finite.double().cpu() + (not math.isfinite(norm))
        if self.ranks.sum(bad).item():
            raise UserError(
                f"{self.run.path}: the loss or its gradient is not finite, at step {self.step} or since the last one "
                "logged; lower training.optimizer.lr or lengthen the warm-up, in another `run`, or run again from the "
                "last checkpoint"
            )

    def _leave_preempted(self) -> None:
        """Says so in status.json before any rank ends, since the first to end may take the others with it."""
        message = f"stopped at step {self.step} of {self.training.steps}; run again to continue"
        if self.ranks.is_main:
            self.run.update_status(state="preempted", finished=now(), error=message)
        self.ranks.barrier()
        raise Preempted(message)

    def _validate(self, logger: MetricsLogger | None, progress: Progress | None) -> None:
        totals: dict[str, torch.Tensor] = {}
        with self._evaluating():
            for number, batch in enumerate(self.task.validation_batches(self.share)):
                if progress and number % 8 == 0:
                    progress.update(self.step, "validating")
                for name, value in self.task.validation_step(self.engine, self._to_device(batch)).items():
                    totals[name] = totals.get(name, 0) + value.double().cpu()
        metrics = self.task.validation_metrics({name: self.ranks.sum(total) for name, total in totals.items()})
        if logger:
            logger.scalars("val", self.step, metrics)
            log.info("step %d/%d  validation  %s", self.step, self.training.steps, _as_text(metrics))

    def _picture(self, logger: MetricsLogger | None) -> None:
        with self._evaluating():
            batch = self._to_device(next(iter(self.task.validation_batches(self.share))))
            frames = self.task.picture(self.engine, batch)
        if logger:
            logger.picture("val/picture", self.step, frames)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, and training mode afterwards."""
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()

    def _state(self) -> CheckpointState:
        return CheckpointState(
            step=self.step,
            samples_consumed=self.consumed,
            quarantined=self.task.quarantined,
            world_size=self.ranks.size,
            zero_stage=self.training.zero_stage,
            precision="bf16" if self.dtype == torch.bfloat16 else "fp32",
            config_hash=self.config_hash,
            export=self.task.export_config().model_copy(update={"step": self.step}).model_dump(mode="json"),
        )

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        self._check_finite()
        for found in self.ranks.gather(self.task.quarantined):
            self.task.quarantined.update(found)
        checkpoint = save_checkpoint(
            self.engine, self.run.checkpoints, self._state(), self.ranks, self.training.checkpoint.keep
        )
        self.saved_step = self.step
        log.info("saved %s", checkpoint)

    def _resume(self) -> None:
        newest = newest_checkpoint(self.run.checkpoints) if self.ranks.is_main else None
        checkpoint = self.ranks.from_main(newest)
        if checkpoint is None:
            return
        hash_then = read_state(checkpoint).config_hash
        if hash_then != self.config_hash:
            raise UsageError(
                f"{checkpoint}: was saved under another config; use another `run`, or remove {self.run.checkpoints}"
            )
        state = load_checkpoint(self.engine, checkpoint, self._state(), self.ranks)
        self.step = self.saved_step = state.step
        self.consumed = state.samples_consumed
        self.task.quarantined.update(state.quarantined)
        log.info("continuing from %s", checkpoint)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.ranks.device
        return {
            key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }

    def _summary(self) -> str:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.model.parameters())
        return (
            f"{parameters:,} parameters, {self.dtype}, ZeRO-{self.training.zero_stage}, {self.ranks.size} ranks on "
            f"{self.ranks.device.type}, batch {self.training.batch_size} = {self.ranks.size} ranks x "
            f"{self.share.batch_size} x {self.accumulation} micro-batches"
        )


class StepClock:
    """Means over the steps since the last reading: step time, samples/s, share of it spent waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.last = time.perf_counter()
        self.steps, self.waiting_s, self.elapsed_s = 0, 0.0, 0.0

    def data_ready(self) -> None:
        self.waiting_s += time.perf_counter() - self.last

    def step_done(self) -> None:
        at = time.perf_counter()
        self.elapsed_s += at - self.last
        self.last, self.steps = at, self.steps + 1

    def values(self, batch_size: int) -> dict[str, float]:
        elapsed = max(self.elapsed_s, 1e-9)
        values = {
            "step_s": elapsed / max(1, self.steps),
            "samples_per_s": self.steps * batch_size / elapsed,
            "data_wait_share": self.waiting_s / elapsed,
        }
        self.restart()
        return values


def _as_text(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
