"""bf16 and fp16 at every ZeRO stage: against plain PyTorch, resumed, and what stays in fp32."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.run import Run
from stpredict.training import precision
from stpredict.training.checkpoint import complete_checkpoints, folder_of, read_state
from stpredict.training.config import TrainingConfig
from stpredict.training.precision import resolve_precision
from stpredict.training.restoring import CheckpointReader
from stpredict.training.schedule import learning_rate_factor
from tests.distributed.test_engine import STAGES, TRAINING, assert_same_bits, trial, whole_state
from tests.distributed.toy import ToyModel, repeatable, run_ranks, stack

LOW = [(name, stage) for name in ("bf16", "fp16") for stage in STAGES]
# Every second step without an overflow doubles the scale, so that the next ones overflow: in all starts, some do.
SCALING = {"fp16": {"initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}}
OVERFLOWING = {
    "steps": 12,
    "precision": "fp16",
    "ema_decay": 0.9,
    "deepspeed": SCALING,
    "schedule": {"kind": "constant"},
    "checkpoint": {"every": 1, "keep": 20},
}
ONCE = {"steps": 1, "batch_size": 64, "micro_batch_size": 1, "precision": "bf16", "clip_norm": None}
ACCUMULATED = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Everything that needs two ranks."""
    trials = []
    for name, stage in LOW:
        settings = {"precision": name, "zero_stage": stage}
        trials.append(trial(f"{name}_{stage}", training=settings))
        rich = {"training": settings, "rich": True}
        trials.append(trial(f"{name}_{stage}_rich", until=3, **rich))
        trials.append(trial(f"{name}_{stage}_rich", **rich))
    for stage in STAGES:
        settings = {**OVERFLOWING, "zero_stage": stage}
        trials.append(trial(f"scaled_{stage}", training=settings, dropout=0.5))
        trials.append(trial(f"scaled_{stage}_resumed", training=settings, dropout=0.5, until=5))
        trials.append(trial(f"scaled_{stage}_resumed", training=settings, dropout=0.5))
    for stage in STAGES:
        impatient = {"fp16": {"hysteresis": 1}}
        settings = {"precision": "fp16", "zero_stage": stage, "micro_batch_size": 2, "deepspeed": impatient}
        trials.append(trial(f"refused_{stage}", training=settings, refuse=2, watch_changes=True))
    for stage in (1, 2, 3):  # of ZeRO-0 the scale falls by the first overflow
        patient = {"fp16": {"initial_scale_power": 20, "hysteresis": 3}}
        settings = {"precision": "fp16", "zero_stage": stage, "deepspeed": patient, "guards": {"max_bad_steps": 1}}
        trials.append(trial(f"patient_{stage}", training=settings))
    for before, after in ((0, 3), (2, 0)):
        settings = {**OVERFLOWING, "zero_stage": after}
        changed = {"copy_of": f"scaled_{before}", "resave": True, "training": settings}
        trials.append(trial(f"scaled_{before}_as_{after}", **changed))
    for stage, dtype in ACCUMULATED:
        settings = {**ONCE, "zero_stage": stage, "accumulation_dtype": dtype}
        trials.append(trial(f"accumulated_{stage}_{dtype}", training=settings))
    out = tmp_path_factory.mktemp("precision")
    for name, stage in LOW:
        source = {"path": str(folder_of(out / f"{name}_{stage}_rich" / "checkpoints", 6))}
        settings = {"precision": name, "zero_stage": stage}
        trials.append(trial(f"{name}_{stage}_from", training=settings, rich=True, init_from=source))
    results = run_ranks(trials, out, 2, timeout_s=500)
    trained = [trial["run"] for trial in trials if "resave" not in trial]
    return out, dict(zip(trained, results, strict=True))


@pytest.mark.parametrize(("name", "stage"), LOW)
def test_losses_follow_plain_pytorch_in_the_same_precision(runs, name, stage):
    """At ZeRO-0 to fp32's rounding: fp32 weights under torch's autocast. Elsewhere weights themselves are rounded."""
    training = TrainingConfig.model_validate(TRAINING)
    torch.manual_seed(0)
    model = ToyModel(0.0)
    decayed, others = ([p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    losses = []
    scale = 2**10 if name == "fp16" else 1
    for step in range(training.steps):
        batches = [stack(list(range(step * 8 + rank, step * 8 + 8, 2))) for rank in range(2)]
        count = sum(batch["mask"].sum() for batch in batches)
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches:
            with torch.autocast("cpu", precision.TYPES[name]):
                output = model(batch["x"]).float()
            loss = ((output - batch["y"]) * batch["mask"]).square().sum() / count
            losses[-1] += loss.item()
            (loss * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * learning_rate_factor(training.schedule, step, training.steps)
        optimizer.step()
    found = [row["loss"] for row in Run(runs[0] / f"{name}_{stage}").metrics() if row["split"] == "train"]
    assert found == pytest.approx(losses, rel=1e-5 if stage == 0 else 5e-3)


@pytest.mark.parametrize(("name", "stage"), LOW)
def test_the_state_is_fp32_and_buffers_are_not_rounded(runs, name, stage):
    reader = CheckpointReader(complete_checkpoints(runs[0] / f"{name}_{stage}_rich" / "checkpoints")[-1])
    low = {"bf16": "BF16", "fp16": "F16"}[name]
    frozen = {f"model/weight/frozen.{part}" for part in ("weight", "bias")} if stage else set()
    assert {key for key, entry in reader.index.items() if entry.dtype == low} == frozen
    level = torch.zeros(())
    for _ in range(6):
        level.lerp_(torch.ones(()), 0.25)
    assert level.to(precision.TYPES[name]).float() != level
    assert torch.equal(reader.tensor("model/buffer/level"), level)


@pytest.mark.parametrize(("name", "stage"), LOW)
def test_buffers_are_equal_on_all_ranks_after_any_start(runs, name, stage):
    out, results = runs
    level = CheckpointReader(folder_of(out / f"{name}_{stage}_rich" / "checkpoints", 6)).tensor("model/buffer/level")
    for start, expected in (("", None), ("_rich", 1 - 0.75**3), ("_from", level.item())):
        first, second = results[f"{name}_{stage}{start}"]["buffers"]
        assert first == second
        assert first["mark"] == ["torch.float32", [0, 0, 0]]
        if expected:
            assert first["level"] == ["torch.float32", pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_makes_its_step_void_and_halves_the_scale(runs, stage):
    run = Run(runs[0] / f"scaled_{stage}")
    scales = [row["loss_scale"] for row in run.metrics() if row["split"] == "train"]
    voids = 0
    for before, (step, scale) in zip([2.0**18, *scales], enumerate(scales, 1), strict=False):
        assert scale in (before / 2, before, before * 2)
        folders = [folder_of(run.checkpoints, at) for at in (step - 1, step)]
        if step == 1:
            continue
        states = [read_state(folder) for folder in folders]
        assert [state.loss_scale["scale"] for state in states] == [before, scale]
        made = states[1].optimizer_steps["model"] - states[0].optimizer_steps["model"]
        assert made == (scale >= before)
        old, new = map(CheckpointReader, folders)
        moved = {key for key in new.index if not torch.equal(old.tensor(key), new.tensor(key))}
        assert {key.split("/")[1] for key in moved} == ({"weight", "exp_avg", "exp_avg_sq", "ema"} if made else set())
        voids += not made
    assert 3 <= voids <= 8


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_refused_by_the_guards_leaves_the_scale_alone(runs, stage):
    out, results = runs
    assert results[f"refused_{stage}"]["changed"] == [True, True, False, True, True, True]
    rows = [row for row in Run(out / f"refused_{stage}").metrics() if row["split"] == "train"]
    assert [(row["loss_scale"], row["steps_skipped"]) for row in rows] == [(2**16, step > 1) for step in range(6)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_is_no_bad_step_where_the_scale_waits_for_more_of_them(runs, stage):
    rows = [row for row in Run(runs[0] / f"patient_{stage}").metrics() if row["split"] == "train"]
    assert [row["loss_scale"] for row in rows][:3] == [2**20, 2**20, 2**19]
    assert [row["steps_skipped"] for row in rows] == [0] * 6


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_scale_is_resumed_to_the_bit(runs, stage):
    whole, resumed = (Run(runs[0] / f"scaled_{stage}{suffix}") for suffix in ("", "_resumed"))
    assert_same_bits(whole_state(whole), whole_state(resumed))
    states = [read_state(complete_checkpoints(run.checkpoints)[-1]) for run in (whole, resumed)]
    assert states[0].loss_scale == states[1].loss_scale
    rows = [[repeatable(row) for row in run.metrics()] for run in (whole, resumed)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("before", "after"), [(0, 3), (2, 0)])
def test_the_loss_scale_goes_with_the_state_to_another_stage(runs, before, after):
    saved = complete_checkpoints(runs[0] / f"scaled_{before}" / "checkpoints")[-1]
    again = runs[0] / f"scaled_{before}_as_{after}" / "resaved" / saved.name
    readers = map(CheckpointReader, (saved, again))
    assert_same_bits(*({key: reader.tensor(key) for key in reader.index} for reader in readers))
    scales = [read_state(folder).loss_scale for folder in (saved, again)]
    assert scales[0]["scale"] == scales[1]["scale"] != 2.0**18
    assert (scales[0]["steps"] - scales[1]["steps"]) % SCALING["fp16"]["loss_scale_window"] == 0


def _gradients() -> dict[str, torch.Tensor]:
    """Of the first step: bf16's of each micro-batch, added up in fp64."""
    torch.manual_seed(0)
    model = ToyModel(0.0).bfloat16()
    batches = [stack([n]) for n in range(64)]
    count = sum(batch["mask"].sum() for batch in batches)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for batch in batches:
        error = (model(batch["x"]).float() - batch["y"]) * batch["mask"]
        model.zero_grad()
        (error.square().sum() / count * 2).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.double() / 2
    return total


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_accumulate_in_fp32_unless_asked_for_less(runs, stage):
    """Adam's first moment after one step is a tenth of the gradient."""
    gradients, errors = _gradients(), {}
    for dtype in ("fp32", "bf16"):
        reader = CheckpointReader(complete_checkpoints(runs[0] / f"accumulated_{stage}_{dtype}" / "checkpoints")[-1])
        found = {name: reader.tensor(f"model/exp_avg/{name}").double() * 10 for name in gradients}
        errors[dtype] = max(float((found[name] - g).norm() / g.norm()) for name, g in gradients.items())
    assert errors["fp32"] < 1e-6
    assert errors["bf16"] > 1e-3


def test_what_does_not_go_together_is_refused_in_a_line(monkeypatch):
    def refused(match: str, **settings) -> None:
        with pytest.raises(UsageError, match=match):
            resolve_precision(TrainingConfig(steps=1, batch_size=1, **settings), torch.device("cpu"))

    monkeypatch.setattr(precision, "cpu_fp16_is_real", lambda: False)
    refused("this CPU does not compute in fp16; use bf16, fp32 or auto", precision="fp16")
    refused("accumulation_dtype bf16 does not go with .* fp32; use fp32", precision="fp32", accumulation_dtype="bf16")
    refused("fp16 does not go with .* bf16; use fp32 or bf16", precision="bf16", accumulation_dtype="fp16")
    refused("ZeRO-0 has fp32 weights", precision="bf16", accumulation_dtype="bf16", zero_stage=0)


def test_auto_is_bf16_where_it_is_real_at_any_stage(monkeypatch):
    for real, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_bf16_is_real", lambda real=real: real)
        for stage in STAGES:
            training = TrainingConfig(steps=1, batch_size=1, zero_stage=stage)
            assert resolve_precision(training, torch.device("cpu")) == expected
