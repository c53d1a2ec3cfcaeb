"""The discriminator that a task trains against its model: in plain DDP, with an optimizer of its own.

Why it is no DeepSpeed engine: with the model in one and the discriminator in another, gradients through the second are
wrong under ZeRO 1 and raise under 2 and 3; plain DDP is exact at every stage.
"""

from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stpredict.training.config import OptimizerConfig
from stpredict.training.deepspeed_setup import build_optimizer
from stpredict.training.pieces import Held
from stpredict.training.ranks import Ranks
from stpredict.training.task import Batch, Task


class Adversary:
    """Trains ``task.discriminator``, in fp32, on the batches that the model has just been trained on."""

    def __init__(self, task: Task, config: OptimizerConfig, ranks: Ranks):
        self.task, self.config, self.ranks = task, config, ranks
        self.module: nn.Module = task.discriminator.to(ranks.device)
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.module, config)
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

    @contextmanager
    def judging(self):
        """While the model learns from its judgement, the discriminator's own gradients are not computed."""
        for parameter in self.trained:  # not what is frozen for good
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.trained:
                parameter.requires_grad_(True)

    def backward(self, micro_batches: list[Batch], counts: dict[str, float]) -> dict[str, Tensor]:
        """The gradient of a step, averaged over the ranks. Returns this rank's sums of every term."""
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, 1):
            # DDP averages gradients over the ranks, once, with the last micro-batch; counts already span all of them.
            with nullcontext() if number == len(micro_batches) else self.ddp.no_sync():
                sums = self.task.discriminator_step(self.ddp, batch)
                weights = self.task.discriminator_weights
                loss = sum(weight * sums[name] / counts[name] for name, weight in weights.items())
                (loss * self.ranks.size).backward()
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value.detach()
        return total

    def grad_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def update(self, factor: float) -> None:
        """By the gradient that is there, the learning rate times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        self.optimizer.step()
