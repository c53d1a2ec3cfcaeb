"""Counts the bytes of every collective of a step, in ranks: ``python collective_bytes.py OUT`` with a JSON list of
trials, each {model, training}, on standard input. Rank 0 prints what the last step of each moved, by kind."""

import json
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.rank import leave
from stpredict.priors.config import LatentConfig, NextBlockConfig
from stpredict.priors.data import PlannedLatents
from stpredict.priors.task import PriorTask
from stpredict.training.config import TrainingConfig
from stpredict.training.learner import Learner
from stpredict.training.ranks import join_ranks

KINDS = {
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "_allgather_base_": "all-gather",
}
LATENT = LatentConfig(grid=(2, 4, 4), codebook_size=1000)
STEPS = 2  # ZeRO-3 learns the order of the modules in the first


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor of each collective, as torch dispatches it, whoever asked for it."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            sizes = [
                sum(t.numel() * t.element_size() for t in tree_leaves(argument) if torch.is_tensor(t))
                for argument in args[:2]
            ]
            self.bytes[KINDS.get(name, name)] += max(sizes)  # of a gathering or scattering one the larger side
        return func(*args, **(kwargs or {}))


def task_of(model: dict) -> PriorTask:
    return PriorTask(NextBlockConfig(**model), PlannedLatents(LATENT), None, 0)


def main() -> None:
    with join_ranks() as ranks:
        for trial in json.loads(sys.stdin.read()):
            torch.manual_seed(0)
            task, training = task_of(trial["model"]), TrainingConfig.model_validate(trial["training"])
            learner = Learner(task, training, ranks)
            learner.engine.train()
            size = training.batch_size // (ranks.size * learner.accumulation)
            for step in range(STEPS):
                latents = [torch.randint(0, 1000, (size, *LATENT.grid)) for _ in range(learner.accumulation)]
                batches = [{"key": ["clip"] * size, "latent": latent} for latent in latents]
                share = task.counts(batches[0])
                counts = {name: count * ranks.size * learner.accumulation for name, count in share.items()}
                with Collectives() as counted:
                    learner.step(step, batches, counts)
            if ranks.is_main:
                print(json.dumps(counted.bytes), flush=True)


if __name__ == "__main__":
    main()
    leave(0)
