"""The model in its DeepSpeed engine, the discriminator beside it and the averages of the weights: what training
changes, and what one step does to it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from stpredict.training.activation_checkpointing import recompute
from stpredict.training.adaptive_weight import AdaptiveWeight
from stpredict.training.adversary import Adversary
from stpredict.training.compilation import compile_layers, compiles
from stpredict.training.config import DiscriminatorConfig, TrainingConfig
from stpredict.training.deepspeed_setup import build_engine
from stpredict.training.forks import keep_from_forks
from stpredict.training.guards import Guards
from stpredict.training.pieces import Ema, Held, Piece, dealt, elements, owned
from stpredict.training.precision import NAMES, TYPES, LossScale, resolve_precision
from stpredict.training.ranks import Ranks
from stpredict.training.schedule import apply_schedule, learning_rate_factor
from stpredict.training.skipping import Buffers, Skippable
from stpredict.training.stragglers import Stragglers
from stpredict.training.task import Batch, Sums, Task, add_to, weighted

log = logging.getLogger(__name__)


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
        # Where CPUs differ, so does what `auto` means.
        self.precision = ranks.from_main(NAMES[resolve_precision(training, ranks.device)])
        self.dtype = TYPES[self.precision]
        self.adaptive = None
        if task.discriminator is not None and training.discriminator.adaptive_weight:
            self.adaptive = AdaptiveWeight(task, ranks, self.accumulation)
        if compiles(task.layers(), training, ranks.device):
            compile_layers(task.layers())
        recompute(task.layers(), training.activation_checkpointing)
        self.engine = build_engine(task.model, training, self.dtype, ranks.size, self.accumulation)
        self.loss_scale = LossScale(self.engine) if self.dtype == torch.float16 else None
        self.adversary = None
        if task.discriminator is not None:
            self.adversary = Adversary(task, training.discriminator, ranks)
        elif training.discriminator != DiscriminatorConfig():
            log.log(ranks.warning, "training.discriminator is ignored: this model has none")
        self.held = [Held("model", task.model, self.engine.basic_optimizer, self.engine)]
        self.held += [self.adversary.held()] if self.adversary else []
        trained = {piece.key for piece in self.held[0].trained_weights()}
        self.ema = None
        if training.ema_decay is not None:
            self.ema = Ema([piece for piece in self.owned() if piece.key in trained], training.ema_decay)
        # Weights that every rank holds, with the rank that alone has their averages.
        shared = dealt((piece for part in self.held for piece in part.pieces()), ranks.size)
        self._replicated = [(piece, owner) for piece, owner in shared if piece.key in trained]
        keep_from_forks(piece.tensor for piece in self.owned())
        self.stragglers = Stragglers(ranks, training.guards.slow_rank, training.zero_stage)
        self.guards = Guards(training.guards, ranks.warning)
        self.update = Skippable(self.engine)
        self.buffers = Buffers([part.model for part in self.held])

    def step(self, number: int, micro_batches: list[Batch], counts: dict[str, float]) -> Sums:
        """Step ``number`` (from 0): forward and backward of all micro-batches, then one update of everything whose
        turn it is, or of nothing where the guards refuse it. Returns this rank's sums of every term."""
        training, adversary = self.training, self.adversary
        factor = learning_rate_factor(training.schedule, number, training.steps)
        apply_schedule(self.engine.optimizer, training.optimizer, training.schedule, number, training.steps)
        self.buffers.keep()
        total: Sums = {}
        if self.adaptive:
            self.adaptive.weights.clear()
        self.model_learned = adversary is None or adversary.model_learns(number)
        self.discriminator_learned = adversary is not None and adversary.learns(number)
        judged = adversary is not None and adversary.judges(number)
        loss = torch.zeros((), device=self.ranks.device)
        for left, batch in zip(range(len(micro_batches))[::-1], micro_batches, strict=True):
            sums, part = self._learn_from(batch, counts, judged) if self.model_learned else self._look_at(batch, counts)
            if left and self.model_learned:
                self.engine.step()  # counts the micro-batch
            loss += part
            add_to(total, sums)
        self.at("the discriminator's step" if self.discriminator_learned else "judging the loss")
        told = adversary.backward(number, micro_batches, counts) if self.discriminator_learned else {}
        skip = self.guards.refuses(number, *self._over_ranks(loss, told))
        self.at("update")
        scaled = self.loss_scale.state() if self.loss_scale else {}
        applied = self.update.step(skip) if self.model_learned else not skip
        if skip and scaled:
            self.loss_scale.restore(scaled)  # which had no part in it
        # A step that fp16 overflowed in is no bad one: the scale is lower now, or will be after the next.
        if skip or applied or not self.loss_scale or not self.loss_scale.lowered_since(scaled):
            self.guards.took(number, applied)
        if not applied:
            self.buffers.put_back()
            return total | told
        if self.ema and self.model_learned:
            self.ema.update()
        if self.discriminator_learned:
            adversary.update(factor, told, counts)
        return total | told

    def _over_ranks(self, loss: Tensor, told: Sums) -> tuple[float, bool]:
        """The step's loss, and whether the discriminator's losses and gradient are finite. The ranks decide by these
        together, which costs a step one wait for the GPU."""
        values = [*told.values(), *([self.adversary.grad_norm()] if told else [])]
        finite = torch.stack([torch.ones_like(loss), *(value.detach().float() for value in values)]).isfinite().all()
        mine = torch.stack([loss.double(), (~finite).double()])
        loss, bad = self.ranks.sum(mine.cpu()).tolist()
        return loss, not bad

    def _learn_from(self, batch: Batch, counts: dict[str, float], judged: bool) -> tuple[Sums, Tensor]:
        """Forward and backward of the model on one micro-batch. Returns the sum of every term, and the loss without
        the adversarial terms, as it is logged; it is not finite where they are not."""
        cut = self.adaptive.cut(self.engine) if judged and self.adaptive else None
        self.at("forward")
        with self.stragglers.forward():
            sums = dict(self.task.training_step(cut or self.engine, batch))
        loss = own = weighted(sums, self.task.weights, counts)
        with self.adversary.judging() if judged else nullcontext() as judge:
            if judged:
                told = self.task.adversarial_step(judge, batch)
                sums |= told
                adversarial = weighted(told, self.task.adversarial_weights, counts)
                loss = self.adaptive.combined(cut, own, adversarial) if cut else own + adversarial
            self.at("backward")
            # DeepSpeed averages gradients over ranks; counts already span them, so the average is undone.
            self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        for name, tensor in batch.items():
            if torch.is_tensor(tensor) and tensor.requires_grad:
                batch[name] = tensor.detach()  # the discriminator's gradient ends here; the graph may go
        return sums, own.detach() + 0 * loss.detach()

    @torch.no_grad()
    def _look_at(self, batch: Batch, counts: dict[str, float]) -> tuple[Sums, Tensor]:
        """Forward of the model on a micro-batch of which the discriminator alone learns; returns the same."""
        self.at("forward")
        with self.stragglers.forward():
            sums = self.task.training_step(self.engine, batch)
        return sums, weighted(sums, self.task.weights, counts)

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

    def values(self) -> dict[str, float]:
        """Of the last step, beside its terms: of those who learned in it."""
        values = {"grad_norm": self.grad_norm} if self.model_learned else {}
        values["lr"] = self.learning_rate
        if self.discriminator_learned:
            values["discriminator_lr"] = self.adversary.learning_rate
        if self.adaptive and self.adaptive.weights:
            values["adaptive_weight"] = float(torch.stack(self.adaptive.weights).mean())
        return values

    @property
    def learning_rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]

    def not_finite(self) -> list[str]:
        """Keys, over all ranks, of what of the training state is not finite. A buffer may hold infinity, as masks do,
        but no NaN."""
        pieces = [piece for piece in self.owned() if piece.tensor.is_floating_point()]
        bad = [p.tensor.isnan().any() if p.kind == "buffer" else ~p.tensor.isfinite().all() for p in pieces]
        # What is offloaded is on another device than the rest.
        flags = torch.stack([flag.to(self.ranks.device) for flag in bad]).tolist() if bad else []
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
        parameters = sum(map(elements, self.task.model.parameters()))
        ranks, batch = self.ranks, self.training.batch_size
        return (
            f"{parameters:,} parameters, {self.dtype}, ZeRO-{self.training.zero_stage}, {ranks.size} ranks on "
            f"{ranks.device.type}, batch {batch} = {ranks.size} ranks x {batch // (ranks.size * self.accumulation)} x "
            f"{self.accumulation} micro-batches"
        )
