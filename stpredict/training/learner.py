"""The model in its DeepSpeed engine, the discriminator beside it and the averages of the weights: what training
changes, and what one step does to it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from stpredict.training.adversary import Adversary
from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import build_engine
from stpredict.training.pieces import Ema, Held, Piece, dealt, owned
from stpredict.training.precision import resolve_precision
from stpredict.training.ranks import Ranks
from stpredict.training.schedule import apply_schedule, learning_rate_factor
from stpredict.training.task import Batch, Sums, Task


class Learner:
    """``held`` is the training state, module by module, and ``ema`` the averages, or None; what is ``owned`` of both
    is saved by this rank and no other."""

    def __init__(self, task: Task, training: TrainingConfig, ranks: Ranks):
        self.task, self.training, self.ranks = task, training, ranks
        self.accumulation = training.accumulation_steps(ranks.size)
        self.dtype = resolve_precision(training.precision, ranks.device, training.zero_stage)
        self.precision = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        self.engine = build_engine(task.model, training, self.dtype, ranks.size, self.accumulation)
        self.adversary = None
        if task.discriminator is not None:
            self.adversary = Adversary(task, training.discriminator_optimizer, ranks)
        self.held = [Held("model", task.model, self.engine.basic_optimizer, self.engine)]
        self.held += [self.adversary.held()] if self.adversary else []
        trained = {piece.key for piece in self.held[0].trained_weights()}
        self.ema = None
        if training.ema_decay is not None:
            self.ema = Ema([piece for piece in self.owned() if piece.key in trained], training.ema_decay)
        # Weights that every rank holds, with the rank that alone has their averages.
        shared = dealt((piece for part in self.held for piece in part.pieces()), ranks.size)
        self._replicated = [(piece, owner) for piece, owner in shared if piece.key in trained]
        # Counted where the loss is and read when values are logged, so that no step waits for a GPU.
        self.non_finite = torch.zeros((), device=ranks.device)

    def step(self, number: int, micro_batches: list[Batch], counts: dict[str, float]) -> Sums:
        """Step ``number`` (from 0): forward and backward of all micro-batches, one update. Returns this rank's sums of
        every term."""
        training = self.training
        factor = learning_rate_factor(training.schedule, number, training.steps)
        apply_schedule(self.engine.optimizer, training.optimizer, training.schedule, number, training.steps)
        total: Sums = {}
        for batch in micro_batches:
            with self.adversary.judging() if self.adversary else nullcontext():
                sums = self.task.training_step(self.engine, batch)
                loss = sum(weight * sums[name] / counts[name] for name, weight in self.task.weights.items())
                # DeepSpeed averages gradients over ranks; counts already span them, so the average is undone.
                self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
            self.non_finite += ~loss.detach().isfinite()
            self.engine.step()
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value.detach()
        if self.ema:
            self.ema.update()
        if self.adversary:
            judged = self.adversary.optimizer_step(micro_batches, counts, factor)
            self.non_finite += sum(~value.isfinite() for value in judged.values())
            total |= judged
        return total

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model computes with the averages of its weights; afterwards with the weights again, as they were to the
        bit. On all ranks. After an error the averages stay: to take them back the ranks would have to meet again."""
        self._swap_averages()
        yield
        self._swap_averages()

    def _swap_averages(self) -> None:
        self.ema.swap()
        for piece, owner in self._replicated:
            dist.broadcast(piece.tensor, src=owner)
        self.held[0].refresh()

    @property
    def grad_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm() or 0.0)

    @property
    def learning_rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]

    def owned(self) -> list[Piece]:
        pieces = owned((piece for part in self.held for piece in part.pieces()), self.ranks.rank, self.ranks.size)
        return pieces + self.averages

    @property
    def averages(self) -> list[Piece]:
        return self.ema.pieces if self.ema else []

    def optimizer_steps(self) -> dict[str, int]:
        """Of each module, and of each parameter that took fewer steps than its module's others."""
        found = {}
        for part in self.held:
            steps = {name: taken for some in self.ranks.gather(part.steps()) for name, taken in some.items()}
            found[part.module] = most = max(steps.values())
            found |= {f"{part.module}/{name}": taken for name, taken in steps.items() if taken != most}
        return found

    def summary(self) -> str:
        """A line that says what is trained, and how."""
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.model.parameters())
        ranks, batch = self.ranks, self.training.batch_size
        return (
            f"{parameters:,} parameters, {self.dtype}, ZeRO-{self.training.zero_stage}, {ranks.size} ranks on "
            f"{ranks.device.type}, batch {batch} = {ranks.size} ranks x {batch // (ranks.size * self.accumulation)} x "
            f"{self.accumulation} micro-batches"
        )
