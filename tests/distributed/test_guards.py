"""What is done about steps that go wrong, in two processes, against plain PyTorch that leaves their batches out."""

from pathlib import Path

import pytest
import torch

from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints, folder_of, read_state
from stpredict.training.config import TrainingConfig
from stpredict.training.restoring import CheckpointReader
from stpredict.training.schedule import learning_rate_factor
from tests.distributed.test_engine import STAGES, assert_same_bits, trial
from tests.distributed.toy import ToyTask, run_ranks, stack

EVERY_STEP = {"ema_decay": 0.9, "checkpoint": {"every": 1, "keep": 100}}
POISONED = 19  # of step 2 (from 0), for the second of two ranks, in the first of its two micro-batches
KINDS = ("nan", "loss", "gradient")
SETTINGS = [("fp32", stage) for stage in STAGES] + [("bf16", stage) for stage in (1, 2, 3)]


def skipping(name: str, precision: str, stage: int, micro: int | None, **changes) -> dict:
    settings = {**EVERY_STEP, "precision": precision, "zero_stage": stage, "micro_batch_size": micro}
    return trial(name, training=settings, rich=True, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that needs two ranks, started once."""
    out = tmp_path_factory.mktemp("guards")
    trials = []
    for precision, stage in SETTINGS:
        for micro in (None, 2):
            for kind in KINDS:
                name = f"{precision}_{stage}_{micro}_{kind}"
                trials.append(skipping(name, precision, stage, micro, poison={POISONED: kind}))
        for name, change in (("poisoned", {"poison": {POISONED: "nan"}}), ("refused", {"refuse": 2})):
            trials.append(skipping(f"{precision}_{stage}_{name}", precision, stage, 2, dropout=0.5, **change))
    run_ranks(trials, out, 2)
    return out


def state_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder_of(run.checkpoints, step))
    return {key: reader.tensor(key) for key in reader.index}


def plain_training(skipped: set[int], forward: int = 8) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The toy with its discriminator, averages and buffers in plain PyTorch and one process, ``forward`` samples at a
    time. ``skipped`` steps take their batch, and that is all."""
    training = trial("", training=EVERY_STEP)["training"]
    config = TrainingConfig.model_validate(training)
    torch.manual_seed(0)
    task = ToyTask(rich=True)
    optimizers = []
    for module, settings in ((task.model, config.optimizer), (task.discriminator, config.discriminator_optimizer)):
        parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr))
    averages = {name: p.detach().clone() for name, p in task.model.named_parameters() if p.requires_grad}
    losses = []
    for step in range(config.steps):
        if step in skipped:
            continue
        batches = [stack(list(range(first, first + forward))) for first in range(step * 8, step * 8 + 8, forward)]
        factor = learning_rate_factor(config.schedule, step, config.steps)
        counts = {name: sum(task.counts(batch)[name] for batch in batches) for name in ("l2", "deceived", "told")}
        for optimizer, settings in zip(optimizers, (config.optimizer, config.discriminator_optimizer), strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor
        losses.append(0.0)
        for batch in batches:
            sums = task.training_step(task.model, batch)
            loss = sum(weight * sums[name] / counts[name] for name, weight in task.weights.items())
            losses[-1] += loss.item()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.clip_norm)
        optimizers[0].step()
        optimizers[1].zero_grad()
        for batch in batches:
            (task.discriminator_step(task.discriminator, batch)["told"] / counts["told"]).backward()
        optimizers[1].step()
        for name, parameter in task.model.named_parameters():
            if name in averages:
                averages[name].lerp_(parameter.detach(), 0.1)
    found = {f"model/weight/{name}": p.detach() for name, p in task.model.named_parameters()}
    found |= {f"model/buffer/{name}": buffer for name, buffer in task.model.named_buffers()}
    found |= {f"model/ema/{name}": average for name, average in averages.items()}
    found |= {f"discriminator/weight/{name}": p.detach() for name, p in task.discriminator.named_parameters()}
    return found, losses


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "stage"), SETTINGS)
def test_a_step_with_what_is_not_finite_on_one_rank_leaves_no_trace_on_any(folder, precision, stage, kind, micro):
    run = Run(folder / f"{precision}_{stage}_{micro}_{kind}")
    assert_same_bits(state_of(run, 2), state_of(run, 3))
    before, after, last = (read_state(folder_of(run.checkpoints, step)) for step in (2, 3, 6))
    assert before.optimizer_steps == after.optimizer_steps == {"model": 2, "discriminator": 2}
    assert (before.samples_consumed, after.samples_consumed) == ({"toy": 16}, {"toy": 24})
    assert (before.guards.steps_skipped, after.guards.steps_skipped, last.guards.steps_skipped) == (0, 1, 1)
    assert (after.guards.bad_in_a_row, last.guards.bad_in_a_row) == (1, 0)
    assert last.optimizer_steps == {"model": 5, "discriminator": 5}
    assert [row["steps_skipped"] for row in run.metrics() if row["split"] == "train"] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_after_it_are_those_of_plain_pytorch_that_never_made_it(folder, stage, kind, micro):
    run = Run(folder / f"fp32_{stage}_{micro}_{kind}")
    expected, losses = plain_training({2}, 8 if micro is None else 4)
    ours = state_of(run, 6)
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert [rows[step]["loss"] for step in (0, 1, 3, 4, 5)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("precision", "stage"), SETTINGS)
def test_a_step_refused_for_its_own_sake_is_skipped_like_one_that_is_not_finite(folder, precision, stage):
    """With dropout, in which the steps after it must not differ either."""
    poisoned, refused = (Run(folder / f"{precision}_{stage}_{name}") for name in ("poisoned", "refused"))
    assert len(complete_checkpoints(refused.checkpoints)) == 6
    for step in range(1, 7):
        assert_same_bits(state_of(poisoned, step), state_of(refused, step))
