"""The model in its DeepSpeed engine, the discriminator beside it and the averages of the weights: what training
changes, and what one step does to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from stpredict.training.activation_checkpointing import recompute
from stpredict.training.adversary import Adversary
from stpredict.training.compilation import compile_layers, compiles
from stpredict.training.config import TrainingConfig
from stpredict.training.deepspeed_setup import build_engine
from stpredict.training.guards import Guards
from stpredict.training.pieces import Ema, Held, Piece, dealt, owned
from stpredict.training.precision import NAMES, LossScale, resolve_precision
from stpredict.training.ranks import Ranks
from stpredict.training.schedule import apply_schedule, learning_rate_factor
from stpredict.training.skipping import Buffers, Skippable
from stpredict.training.stragglers import Stragglers
from stpredict.training.task import Batch, Sums, Task


class Learner:
    """``held`` is the training state, module by module, and ``ema`` the averages, or None; what is ``owned`` of both
    is saved by this rank and no other. ``at`` is told what a step is doing."""

    def __init__(
        self,
        task: Task,
        training: TrainingConfig,
        ranks: Ranks,
        at: Callable[[str], None] = lambda phase: None,
    ):
        self.at = at
        self.task, self.training, self.ranks = task, training, ranks
        self.accumulation = training.accumulation_steps(ranks.size)
        self.dtype = resolve_precision(training, ranks.device)
        self.precision = NAMES[self.dtype]
        if compiles(task.layers(), training, ranks.device):
            compile_layers(task.layers())
        recompute(task.layers(), training.activation_checkpointing)
        self.engine = build_engine(task.model, training, self.dtype, ranks.size, self.accumulation)
        self.loss_scale = LossScale(self.engine) if self.dtype == torch.float16 else None
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
        self.stragglers = Stragglers(ranks, training.guards.slow_rank, training.zero_stage)
        self.guards = Guards(training.guards)
        self.update = Skippable(self.engine)
        self.buffers = Buffers([part.model for part in self.held])

    def step(self, number: int, micro_batches: list[Batch], counts: dict[str, float]) -> Sums:
        """Step ``number`` (from 0): forward and backward of all micro-batches, then one update of everything, or of
        nothing where the guards refuse it. Returns this rank's sums of every term."""
        training = self.training
        factor = learning_rate_factor(training.schedule, number, training.steps)
        apply_schedule(self.engine.optimizer, training.optimizer, training.schedule, number, training.steps)
        self.buffers.keep()
        total: Sums = {}
        loss = torch.zeros((), device=self.ranks.device)
        for left, batch in zip(range(len(micro_batches))[::-1], micro_batches, strict=True):
            self.at("forward")
            with self.adversary.judging() if self.adversary else nullcontext():
                with self.stragglers.forward():
                    sums = self.task.training_step(self.engine, batch)
                part = sum(weight * sums[name] / counts[name] for name, weight in self.task.weights.items())
                self.at("backward")
                # DeepSpeed averages gradients over ranks; counts already span them, so the average is undone.
                self.engine.backward(part * self.ranks.size, scale_wrt_gas=False)
            if left:
                self.engine.step()  # counts the micro-batch
            loss += part.detach()
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value.detach()
        self.at("the discriminator's step" if self.adversary else "judging the loss")
        judged = self.adversary.backward(micro_batches, counts) if self.adversary else {}
        skip = self.guards.refuses(number, *self._over_ranks(loss, judged))
        self.at("update")
        scale = self.loss_scale.scale if self.loss_scale else 0.0
        applied = self.update.step(skip)
        # A step that fp16 overflowed in is no bad one: the scale is lower now.
        if skip or applied or not self.loss_scale or self.loss_scale.scale == scale:
            self.guards.took(number, applied)
        if not applied:
            self.buffers.put_back()
            return total | judged
        if self.ema:
            self.ema.update()
        if self.adversary:
            self.adversary.update(factor)
        return total | judged

    def _over_ranks(self, loss: torch.Tensor, judged: Sums) -> tuple[float, bool]:
        """The step's loss, and whether the discriminator's losses and gradient are finite. The ranks decide by these
        together, which costs a step one wait for the GPU."""
        values = [*judged.values(), *([self.adversary.grad_norm()] if self.adversary else [])]
        finite = torch.stack([torch.ones_like(loss), *(value.detach().float() for value in values)]).isfinite().all()
        mine = torch.stack([loss.double(), (~finite).double()])
        loss, bad = self.ranks.sum(mine.cpu()).tolist()
        return loss, not bad

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
        return self.update.norm

    @property
    def learning_rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]

    def not_finite(self) -> list[str]:
        """Keys, over all ranks, of what of the training state is not finite. A buffer may hold infinity, as masks do,
        but no NaN."""
        pieces = [piece for piece in self.owned() if piece.tensor.is_floating_point()]
        bad = [p.tensor.isnan().any() if p.kind == "buffer" else ~p.tensor.isfinite().all() for p in pieces]
        flags = torch.stack(bad).tolist() if bad else []
        found = self.ranks.gather([piece.key for piece, flag in zip(pieces, flags, strict=True) if flag])
        return sorted({key for keys in found for key in keys})

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
