"""The same training by 1, 2 and 3 processes: losses, schedules and buffers do not depend on who shares the work."""

import json
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from stpredict.run import Run
from stpredict.training.checkpoint import folder_of
from tests.distributed.test_engine import assert_same_bits, checkpoint_weights, last_weights, trial, whole_state
from tests.distributed.toy import ToyModel, run_ranks, stack

SIZES, STAGES, ACCUMULATION = (1, 2, 3), (0, 1, 2, 3), (1, 4)
STEPS, BATCH = 20, 24
#: A masked loss, whose valid entries divide unevenly among the ranks; with a frozen layer, buffers and a discriminator;
#: with batch statistics.
MODELS = {"plain": {}, "rich": {"rich": True}, "normalised": {"normalised": True}}
ONE_CYCLE = {"schedule": {"kind": "one_cycle"}, "optimizer": {"kind": "adamw", "lr": 0.02, "weight_decay": 0.1}}


def settings(size: int, stage: int, accumulation: int = 1, **changes) -> dict:
    return {
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": BATCH // size // accumulation,
        "zero_stage": stage,
        "validate_every": STEPS,
        "picture_every": STEPS,
        "checkpoint": {"every": 10, "keep": 9},
        **changes,
    }


def name_of(model: str, stage: int, accumulation: int) -> str:
    return f"{model}_{stage}_{accumulation}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """Every training, in one start of the ranks for each number of them; their results as results.json."""
    out = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}
    for size, folder in out.items():
        trials = [
            trial(name_of(model, stage, accumulation), training=settings(size, stage, accumulation), **MODELS[model])
            for model in MODELS
            for stage in STAGES
            for accumulation in ACCUMULATION
        ]
        trials += [trial(f"one_cycle_{stage}", training=settings(size, stage, **ONE_CYCLE)) for stage in STAGES]
        both = {"rich": True, "normalised": True}
        if size == 2:
            for stage in (1, 2, 3):
                low = settings(size, stage, precision="bf16")
                trials.append(trial(f"bf16_{stage}", training=low, normalised=True))
                trials.append(trial(f"bf16_{stage}_resumed", training=low, normalised=True, until=13))
                trials.append(trial(f"bf16_{stage}_resumed", training=low, normalised=True))
        if size == 1:  # what the others begin from
            trials.append(trial("source", training=settings(size, 1, steps=5), **both))
        else:
            source = str(folder_of(Run(out[1] / "source").checkpoints, 5))
            for stage in STAGES:
                longer = settings(size, stage, steps=6)
                trials.append(trial(f"fresh_{stage}", training=longer, **both))
                trials.append(trial(f"resumed_{stage}", training=longer, copy_of=str(out[1] / "source"), **both))
                trials.append(trial(f"init_from_{stage}", training=longer, init_from={"path": source}, **both))
        results = run_ranks(trials, folder, size)
        text = {t["run"]: result for t, result in zip(trials, results, strict=True)}
        (folder / "results.json").write_text(json.dumps(text))
    return out


def losses(folder: Path, name: str) -> list[float]:
    found = [row["loss"] for row in Run(folder / name).metrics() if row["split"] == "train"]
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_do_not_depend_on_ranks_nor_on_accumulation(folders, model, stage):
    for accumulation in ACCUMULATION:
        # Batch statistics are those of a micro-batch over all ranks, and the rich model counts its forwards: with
        # another accumulation they are other models.
        reference = losses(folders[1], name_of(model, 0, 1 if model == "plain" else accumulation))
        for size in SIZES:
            found = losses(folders[size], name_of(model, stage, accumulation))
            assert found[0] == pytest.approx(reference[0], rel=1e-6), (size, accumulation)
            assert found == pytest.approx(reference, rel=1e-4), (size, accumulation)
    torch.manual_seed(0)
    trained, begun = last_weights(Run(folders[1] / name_of(model, stage, 1))), ToyModel(0.0).state_dict()
    assert (trained["first.weight"] - begun["first.weight"]).abs().max() > 0.05  # so that equal losses say something


def test_batch_statistics_are_felt(folders):
    assert losses(folders[1], "normalised_0_1")[0] != pytest.approx(losses(folders[1], "plain_0_1")[0], rel=1e-3)
    assert losses(folders[1], "normalised_0_1") != pytest.approx(losses(folders[1], "normalised_0_4"), rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_running_statistics_are_those_of_one_process(folders, size, stage):
    for accumulation in ACCUMULATION:
        name = name_of("normalised", stage, accumulation)
        ours, theirs = last_weights(Run(folders[size] / name)), last_weights(Run(folders[1] / name))
        for key in ("norm.running_mean", "norm.running_var"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
        assert int(ours["norm.num_batches_tracked"]) == STEPS * accumulation


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_batch_norm_survives_bf16_and_a_resume(folders, stage):
    whole, resumed = (Run(folders[2] / f"bf16_{stage}{suffix}") for suffix in ("", "_resumed"))
    state = whole_state(whole)
    assert state["model/buffer/norm.running_mean"].dtype == torch.float32
    assert_same_bits(state, whole_state(resumed))
    assert losses(folders[2], f"bf16_{stage}") == pytest.approx(losses(folders[2], f"normalised_{stage}_1"), rel=0.05)


@pytest.fixture(scope="module")
def one_cycle() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights with torch's OneCycleLR, written out."""
    torch.manual_seed(0)
    model = ToyModel(0.0)
    groups = [[p for p in model.parameters() if (p.ndim >= 2) == matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)], lr=0.02
    )
    scheduler, found = OneCycleLR(optimizer, 0.02, total_steps=STEPS), []
    for step in range(STEPS):
        batch = stack(list(range(step * BATCH, (step + 1) * BATCH)))
        error = (model(batch["x"]) - batch["y"]) * batch["mask"]
        loss = error.square().sum() / batch["mask"].sum()
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if step < STEPS - 1:
            scheduler.step()
    return found, model.state_dict()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_one_cycle_trains_as_torchs_does_its_momentum_too(folders, one_cycle, size, stage):
    assert losses(folders[size], f"one_cycle_{stage}") == pytest.approx(one_cycle[0], rel=1e-5)
    weights = last_weights(Run(folders[size] / f"one_cycle_{stage}"))
    for name, expected in one_cycle[1].items():
        if name != "mark":
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_buffers_are_equal_on_all_ranks_after_any_start_and_at_the_end(folders, size, stage):
    results = json.loads((folders[size] / "results.json").read_text())
    source = checkpoint_weights(folder_of(Run(folders[1] / "source").checkpoints, 5), ema=False)
    for start in ("fresh", "resumed", "init_from"):
        found = results[f"{start}_{stage}"]
        assert all(of_rank == found["begun"][0] for of_rank in found["begun"]), start
        for name, values in found["begun"][0].items():
            expected = source[name] if start != "fresh" else ToyModel(0.0, True, True).get_buffer(name)
            assert values == expected.tolist(), (start, name)
        assert (found["unequal"], found["step"]) == ([], 6)
