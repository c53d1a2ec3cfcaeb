"""What judging its work costs a model: the networks of its losses, and a discriminator that learns beside it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from stpredict.estimates.gpus import Gpu
from stpredict.estimates.shapes import TaskOfShapes
from stpredict.jobs.config import TokenizerJobConfig
from stpredict.training.config import DiscriminatorConfig, TrainingConfig
from stpredict.training.task import Batch, Task, weighted


@dataclass(frozen=True)
class Judging:
    """``parameters`` are the discriminator's; ``flops`` one sample's, of a step on average, once the discriminator has
    started. Of that, where the model learns, ``model_flops`` go forward and back through discriminator and networks,
    by what they look at; where the discriminator learns, ``discriminator_flops`` through it, on both sides, and
    ``r1_flops`` more where R1 is computed. All in fp32."""

    parameters: int
    model_flops: float
    discriminator_flops: float
    r1_flops: float
    flops: float

    def seconds(self, training: TrainingConfig, ranks: int, gpu: Gpu, mfu: float) -> float:
        """Of a step, on each rank. Convolutions in fp32 compute in TF32 where there is such: torch's default."""
        peak = gpu.tflops("tf32") or gpu.tflops("fp32")
        return training.batch_size // ranks * self.flops / (peak * 1e12 * mfu)


def model_learns(task: Task, config: DiscriminatorConfig) -> float:
    """Share of the steps in which it does; in the others it computes a forward pass alone."""
    return 1.0 if task.discriminator is None else 1 / config.model_every


def plan_judging(config: TokenizerJobConfig, task: Task, batch: Callable[..., Batch]) -> Judging | None:
    """From shapes alone; None where nothing judges. ``batch`` makes one of a size on a device."""
    if task.discriminator is None and not task.networks():
        return None
    shapes = TaskOfShapes(task, torch.float32)
    with shapes.entered():
        looking, model, discriminator, with_r1 = _count(shapes.task, batch(1, device="cpu"))
    parameters, flops, learning = 0, model, config.training.discriminator
    if task.discriminator is not None:
        parameters = sum(p.numel() for p in task.discriminator.parameters())
        learns = model_learns(task, learning)
        every = config.loss.adversarial.r1_every
        updates = (discriminator + (with_r1 - discriminator) / every) / learning.every
        flops = learns * model + (1 - learns) * looking + updates
    return Judging(parameters, model, discriminator, with_r1 - discriminator, flops)


class _NoModules(nullcontext):
    """For ModuleTracker, whose hooks do not go with the gradient of a gradient."""

    parents = frozenset({"Global"})


def flop_counter() -> FlopCounterMode:
    """Of everything together, not by module."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter


def _count(task: Task, batch: Batch) -> tuple[float, float, float, float]:
    """FLOPs beside the model's own: of its losses without a backward pass; of its step; of the discriminator's, without
    R1 and with it."""
    counter, of_model = flop_counter(), 0

    def forward(*args, **kwargs):
        nonlocal of_model
        before = counter.get_total_flops()
        with torch.no_grad():
            made = task.model(*args, **kwargs)
        of_model += counter.get_total_flops() - before
        return tree_map(lambda x: x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x, made)

    counts = task.counts(batch)
    with counter:
        sums = dict(task.training_step(forward, batch))
        looking = counter.get_total_flops() - of_model
        loss = weighted(sums, task.weights, counts)
        if task.discriminator is not None:
            task.discriminator.requires_grad_(False)
            loss = loss + weighted(task.adversarial_step(task.discriminator, batch), task.adversarial_weights, counts)
        loss.backward()
    model = counter.get_total_flops() - of_model
    if task.discriminator is None:
        return looking, model, 0, 0
    task.discriminator.requires_grad_(True)
    batch = {name: x.detach() if torch.is_tensor(x) else x for name, x in batch.items()}
    found = []
    for update in (1, 0):
        with flop_counter() as counter:
            sums = task.discriminator_step(task.discriminator, batch, update)
            weighted(sums, task.discriminator_weights, counts).backward()
        found.append(counter.get_total_flops())
    return looking, model, *found
