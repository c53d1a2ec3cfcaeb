"""What the steps since the last line of metrics.jsonl did, took and used: the values of the next line."""

import torch
from torch import nn

from stpredict.quantizers.code_use import perplexity, share_used
from stpredict.training.clock import StepClock
from stpredict.training.config import TrainingConfig
from stpredict.training.flops import FORWARDS_PER_STEP, ForwardFlops, peak_tflops
from stpredict.training.learner import Learner
from stpredict.training.memory import memory
from stpredict.training.pieces import elements
from stpredict.training.ranks import Ranks
from stpredict.training.scale import Scale
from stpredict.training.task import Batch, Sums, Task


class Meter:
    """Told of every step on every rank, at no cost to speak of: nothing waits for a GPU until a line is due."""

    def __init__(self, task: Task, training: TrainingConfig, learner: Learner, ranks: Ranks, flops: ForwardFlops):
        self.task, self.training, self.learner, self.ranks, self.flops = task, training, learner, ranks, flops
        self.clock = StepClock()
        self.tokens = 0
        self.code_use: Sums = {}
        self.scale: Scale | None = None  # known with the first line
        flops.watch(learner.engine)
        self.peak = peak_tflops(ranks.device, learner.dtype, training.peak_tflops) if ranks.is_main else None

    def data_ready(self, micro_batches: list[Batch]) -> None:
        self.clock.data_ready()
        self.tokens += sum(map(self.task.tokens, micro_batches))

    def step_done(self, sums: Sums) -> None:
        self.clock.step_done()
        for name, uses in sums.items():
            if uses.ndim:
                self.code_use[name] = self.code_use.get(name, 0) + uses

    def skip(self) -> None:
        """What was done since the last step is no part of the next one."""
        self.clock.skip()

    def restart(self) -> None:
        """The next line is about what comes now."""
        self.clock.restart()
        self.tokens, self.code_use = 0, {}
        self.flops.forget()

    def values(self, sums: Sums, counts: dict[str, float], replaced: int) -> dict[str, float]:
        """The values, the same on all ranks but for times and FLOPs, which are rank 0's. ``sums`` and ``counts`` are
        the last step's; ``replaced`` samples were, on this rank, by others because they could not be read."""
        terms = {name: value for name, value in sums.items() if not value.ndim}
        totals = self.ranks.sum(torch.stack([value.double().cpu() for value in terms.values()])).tolist()
        self.clock.drained()
        means = {name: total / counts[name] for name, total in zip(terms, totals, strict=True)}
        learner, clock = self.learner, self.clock
        values = {
            "loss": sum(weight * means[name] for name, weight in self.task.weights.items()),
            **means,
            **learner.values(),
            "steps_skipped": learner.guards.state.steps_skipped,
            **({"loss_scale": learner.loss_scale.scale} if learner.loss_scale else {}),
        }
        values["step_s"] = clock.elapsed_s / max(1, clock.steps)
        values |= clock.percentiles()
        values["samples_per_s"] = clock.steps * self.training.batch_size / clock.elapsed_s
        if self.tokens:
            values["tokens_per_s"] = self.tokens * self.ranks.size / clock.elapsed_s
        flops = self.flops.take() if self.ranks.is_main else 0
        self.scale = self._scale(flops)
        values |= self._throughput(flops) | self._of_all_ranks(replaced) | self._code_use()
        self.restart()
        return values

    def _scale(self, flops: float) -> Scale:
        """Of a step among those since the last line."""
        model, steps, ranks = self.task.model, max(1, self.clock.steps), self.ranks.size
        tables = [table.weight for table in model.modules() if isinstance(table, nn.Embedding)]
        return Scale(
            parameters=sum(map(elements, model.parameters())),
            embedding_parameters=sum(map(elements, tables)),
            tokens_per_step=self.tokens * ranks // steps,
            flops_per_step=FORWARDS_PER_STEP * flops * ranks / steps if flops else None,
        )

    def _throughput(self, flops: float) -> dict[str, float]:
        if not flops:
            return {}
        tflops = FORWARDS_PER_STEP * flops / self.clock.elapsed_s / 1e12
        return {"tflops": tflops} | ({"mfu": tflops / self.peak} if self.peak else {})

    def _of_all_ranks(self, replaced: int) -> dict[str, float]:
        """Of the rank that waits longest and of the one that uses most; samples of all together."""
        here = {
            "data_wait_share": self.clock.waiting_s / self.clock.elapsed_s,
            **memory(self.ranks.device),
            "samples_replaced": replaced,
            "quarantined": list(self.task.quarantined),
        }
        ranks = self.ranks.gather(here)
        quarantined = {key for rank in ranks for key in rank.pop("quarantined")}
        values = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        values["host_free_gb"] = min(rank["host_free_gb"] for rank in ranks)
        values["samples_replaced"] = sum(rank["samples_replaced"] for rank in ranks)
        return values | {"samples_quarantined": len(quarantined)}

    def _code_use(self) -> dict[str, float]:
        values = {}
        for name, uses in self.code_use.items():
            uses = self.ranks.sum(uses.double().cpu())
            values |= {f"{name}_used_share": share_used(uses), f"{name}_perplexity": perplexity(uses)}
        return values
