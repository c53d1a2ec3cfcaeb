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
#: With the optimizer's state in the host's memory; micro-batches of 2, where the next step could add to what is left.
OFFLOADED = [("bf16", 1, "gradient"), ("fp16", 1, "refused"), ("fp16", 2, "gradient"), ("bf16", 3, "gradient")]
SETTINGS = [("fp32", stage) for stage in STAGES] + [("bf16", stage) for stage in (1, 2, 3)]


def skipping(name: str, precision: str, stage: int, micro: int | None, **changes) -> dict:
    settings = {**EVERY_STEP, "precision": precision, "zero_stage": stage, "micro_batch_size": micro}
    return trial(name, training=settings, rich=True, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Everything that needs two ranks, started once: where it is, and what rank 0 said of each."""
    out = tmp_path_factory.mktemp("guards")
    trials = []
    for precision, stage in SETTINGS:
        for micro in (None, 2):
            for kind in KINDS:
                name = f"{precision}_{stage}_{micro}_{kind}"
                trials.append(skipping(name, precision, stage, micro, poison={POISONED: kind}, watch_changes=True))
        for name, change in (("poisoned", {"poison": {POISONED: "nan"}}), ("refused", {"refuse": 2})):
            trials.append(skipping(f"{precision}_{stage}_{name}", precision, stage, 2, dropout=0.5, **change))
    for precision, stage, kind in OFFLOADED:
        bad = {"refuse": 2} if kind == "refused" else {"poison": {POISONED: kind}}
        offloaded = skipping(f"offloaded_{precision}_{stage}_{kind}", precision, stage, 2, watch_changes=True, **bad)
        offloaded["training"]["offload"] = {"optimizer": "cpu"}
        trials.append(offloaded)
    said = run_ranks(trials, out, 2, timeout_s=400)
    return out, {trial["run"]: found for trial, found in zip(trials, said, strict=True)}


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
    for module, settings in ((task.model, config.optimizer), (task.discriminator, config.discriminator.optimizer)):
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
        for optimizer, settings in zip(optimizers, (config.optimizer, config.discriminator.optimizer), strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor
        losses.append(0.0)
        for batch in batches:
            sums = task.training_step(task.model, batch)
            loss = sum(weight * sums[name] / counts[name] for name, weight in task.weights.items())
            losses[-1] += loss.item()
            deceived = task.adversarial_step(task.discriminator, batch)["deceived"] / counts["deceived"]
            (loss + task.adversarial_weights["deceived"] * deceived).backward()
            batch["output"] = batch["output"].detach()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.clip_norm)
        optimizers[0].step()
        optimizers[1].zero_grad()
        for batch in batches:
            (task.discriminator_step(task.discriminator, batch, step)["told"] / counts["told"]).backward()
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
def test_a_step_with_what_is_not_finite_on_one_rank_leaves_no_trace_on_any(runs, precision, stage, kind, micro):
    folder, said = runs
    name = f"{precision}_{stage}_{micro}_{kind}"
    assert said[name]["changed"] == [True, True, False, True, True, True]
    run = Run(folder / name)
    saved = [int(path.name[-8:]) for path in complete_checkpoints(run.checkpoints)]
    assert saved == [1, 2, 4, 5, 6]  # what bad steps lead back to is from before them
    before, after, last = (read_state(folder_of(run.checkpoints, step)) for step in (2, 4, 6))
    assert before.optimizer_steps == {"model": 2, "discriminator": 2}
    assert after.optimizer_steps == {"model": 3, "discriminator": 3}
    assert (before.samples_consumed, after.samples_consumed) == ({"toy": 16}, {"toy": 32})
    assert (before.guards.steps_skipped, after.guards.steps_skipped, last.guards.steps_skipped) == (0, 1, 1)
    assert [row["steps_skipped"] for row in run.metrics() if row["split"] == "train"] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_after_it_are_those_of_plain_pytorch_that_never_made_it(runs, stage, kind, micro):
    run = Run(runs[0] / f"fp32_{stage}_{micro}_{kind}")
    expected, losses = plain_training({2}, 8 if micro is None else 4)
    ours = state_of(run, 6)
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    rows = [row for row in run.metrics() if row["split"] == "train"]
    assert [rows[step]["loss"] for step in (0, 1, 3, 4, 5)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("precision", "stage", "kind"), OFFLOADED)
def test_no_gradient_of_a_skipped_step_is_left_where_the_optimizer_is_offloaded(runs, precision, stage, kind):
    folder, said = runs
    name = f"offloaded_{precision}_{stage}_{kind}"
    assert said[name]["changed"] == [True, True, False, True, True, True]
    ours = state_of(Run(folder / name), 6)
    for key, tensor in plain_training({2}, 4)[0].items():
        if "/frozen." not in key:  # which is rounded
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("precision", "stage"), SETTINGS)
def test_a_step_refused_for_its_own_sake_is_skipped_like_one_that_is_not_finite(runs, precision, stage):
    """With dropout, in which the steps after it must not differ either."""
    poisoned, refused = (Run(runs[0] / f"{precision}_{stage}_{name}") for name in ("poisoned", "refused"))
    for step in (1, 2, 4, 5, 6):
        assert_same_bits(state_of(poisoned, step), state_of(refused, step))


ROLLING = {"steps": 8, "ema_decay": 0.9, "checkpoint": {"every": 2}, "guards": {"max_bad_steps": 3, "max_rollbacks": 2}}
WINDOW = {number: "nan" for step in (4, 5, 6) for number in range(step * 8, step * 8 + 8)}
SPIKE = {"threshold": 5, "window": 20}


@pytest.fixture(scope="module")
def rolled(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Trainings that meet a window of bad steps after the checkpoint of step 4; and one that has not the window."""
    out = tmp_path_factory.mktemp("rolled")
    spiky = {"steps": 20, "log_every": 1, "validate_every": 20, "picture_every": 20, "checkpoint": {"every": 10}}
    spikes = dict.fromkeys((14 * 8 + 1, 16 * 8 + 1), "spike")
    trials = []
    for stage in STAGES:
        settings = {**ROLLING, "zero_stage": stage}
        trials.append(trial(f"rolled_{stage}", training=settings, rich=True, dropout=0.5, poison=WINDOW))
        trials.append(trial(f"without_{stage}", training=settings, rich=True, dropout=0.5, without=[32, 24]))
    killed = trial("killed", training={**ROLLING, "zero_stage": 2}, rich=True, dropout=0.5, poison=WINDOW)
    trials += [{**killed, "lose_after": 5}, killed]
    for action in ("warn", "skip"):
        spike = {**SPIKE, "action": action}
        trials.append(trial(f"spike_{action}", training={**spiky, "guards": {"spike": spike}}, poison=spikes))
    spike = {**SPIKE, "action": "skip"}
    resumed = trial("spike_resumed", training={**spiky, "guards": {"spike": spike}}, poison=spikes)
    trials += [{**resumed, "until": 13}, resumed]
    return out, run_ranks(trials, out, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_after_bad_steps_in_a_row_training_goes_on_from_the_last_checkpoint_past_their_data(rolled, stage):
    out, _ = rolled
    ours, without = (Run(out / f"{name}_{stage}") for name in ("rolled", "without"))
    last = read_state(folder_of(ours.checkpoints, 8))
    assert (last.guards.rollbacks, last.guards.steps_skipped, last.guards.bad_in_a_row) == (1, 3, 0)
    assert last.samples_consumed == {"toy": (8 + 3) * 8}
    assert_same_bits(state_of(ours, 8), state_of(without, 8))
    steps = [row["step"] for row in ours.metrics() if row["split"] == "train"]
    assert steps == list(range(1, 9))  # what was logged of the steps gone back over is gone
    assert ours.status().step == 8


def test_a_run_that_is_killed_after_it_went_back_goes_back_again(rolled):
    out, _ = rolled
    killed, whole = Run(out / "killed"), Run(out / "rolled_2")
    assert_same_bits(state_of(killed, 8), state_of(whole, 8))
    assert read_state(folder_of(killed.checkpoints, 8)).guards == read_state(folder_of(whole.checkpoints, 8)).guards


def test_a_spike_is_named_and_if_so_configured_skipped(rolled):
    out, _ = rolled
    warned, skipped, resumed = (read_state(folder_of(Run(out / f"spike_{name}").checkpoints, 20)) for name in SPIKES)
    assert (warned.guards.steps_skipped, warned.optimizer_steps) == (0, {"model": 20})
    assert (skipped.guards.steps_skipped, skipped.optimizer_steps) == (2, {"model": 18})
    assert resumed.guards == skipped.guards
    assert_same_bits(state_of(Run(out / "spike_skip"), 20), state_of(Run(out / "spike_resumed"), 20))


SPIKES = ("warn", "skip", "resumed")


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        (
            range(1000),
            "3 steps in a row had a loss .* up to step 3, and no checkpoint is there; look at the data there",
        ),
        (range(24, 1000), "3 steps in a row .* for the 3. time since the checkpoint of step 2; look at the data there"),
    ],
)
def test_where_all_is_bad_training_ends_with_a_line_and_nothing_bad_is_saved(tmp_path, poisoned, message):
    poison = dict.fromkeys(poisoned, "nan")
    with pytest.raises(AssertionError, match=message):
        run_ranks([trial("run", training={**ROLLING, "zero_stage": 2}, rich=True, poison=poison)], tmp_path, 1)
    for folder in complete_checkpoints(Run(tmp_path / "run").checkpoints):
        assert all(
            tensor.isfinite().all() for tensor in state_of(Run(tmp_path / "run"), int(folder.name[-8:])).values()
        )
