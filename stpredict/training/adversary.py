"""The discriminator that a task trains against its model: in plain DDP, with an optimizer of its own.

Why it is no DeepSpeed engine: with the model in one and the discriminator in another, gradients through the second are
wrong under ZeRO 1 and raise under 2 and 3; plain DDP is exact at every stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stpredict.training.config import DiscriminatorConfig
from stpredict.training.deepspeed_setup import build_optimizer
from stpredict.training.pieces import Held
from stpredict.training.ranks import Ranks
from stpredict.training.task import Batch, Sums, Task, add_to, weighted


class Adversary:
    """Trains ``task.discriminator``, in fp32, on the batches that the model has just been trained on.

    An update is ``backward`` and ``update``: between them it can be dropped, and nothing has changed.
    """

    def __init__(self, task: Task, config: DiscriminatorConfig, ranks: Ranks):
        self.task, self.config, self.ranks = task, config, ranks
        self.module: nn.Module = task.discriminator.to(ranks.device)
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.module, config.optimizer)
        self.ddp = DistributedDataParallel(
            self.module,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            forward_sync_buffers=False,
            # Else DDP orders gradients anew after the first step, three ranks add them up in another order from then
            # on, and a resumed training, whose first step is a later one, differs in the last bit.
            find_unused_parameters=True,
        )

    def held(self) -> Held:
        return Held("discriminator", self.module, self.optimizer)

    # Who learns at a step is a function of the step alone, so that resuming needs no state.

    def judges(self, step: int) -> bool:
        """Whether the model learns from its judgement at ``step`` (from 0)."""
        return step >= self.config.start and self.model_learns(step)

    def model_learns(self, step: int) -> bool:
        return step < self.config.start or (step - self.config.start + 1) % self.config.model_every == 0

    def learns(self, step: int) -> bool:
        return step >= self.config.start and (step - self.config.start + 1) % self.config.every == 0

    @contextmanager
    def judging(self) -> Iterator[nn.Module]:
        """The discriminator, while the model learns from its judgement: its own gradients are not computed."""
        for parameter in self.trained:  # not what is frozen for good
            parameter.requires_grad_(False)
        try:
            yield self.module
        finally:
            for parameter in self.trained:
                parameter.requires_grad_(True)

    def backward(self, step: int, micro_batches: list[Batch], counts: dict[str, float]) -> Sums:
        """The gradients of the update of ``step``. Returns this rank's sums of every term."""
        number = (step - self.config.start + 1) // self.config.every - 1
        self.optimizer.zero_grad(set_to_none=True)
        total: Sums = {}
        for place, batch in enumerate(micro_batches, 1):
            # DDP averages gradients over the ranks, once, with the last micro-batch; counts already span all of them.
            with nullcontext() if place == len(micro_batches) else self.ddp.no_sync():
                sums = self.task.discriminator_step(self.ddp, batch, number)
                (weighted(sums, self.task.discriminator_weights, counts) * self.ranks.size).backward()
            add_to(total, sums)
        return total

    def grad_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def update(self, factor: float, sums: Sums, counts: dict[str, float]) -> None:
        """One step along the gradients, its learning rate times ``factor``; ``sums`` is what ``backward`` returned."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        self.optimizer.step()
        means = torch.stack([value.float() / counts[name] for name, value in sums.items()])
        torch.distributed.all_reduce(means)  # on the device: no step waits for it
        self.task.discriminator_updated(dict(zip(sums, means.unbind(), strict=True)))

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]
