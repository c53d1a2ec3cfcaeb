"""The engine in two processes, against plain PyTorch in one."""

import copy
import json
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UsageError
from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints
from stpredict.training.config import TrainingConfig
from stpredict.training.restoring import CheckpointReader, CheckpointWeights
from stpredict.training.schedule import learning_rate_factor
from tests.distributed.toy import ToyModel, repeatable, run_ranks, stack

TRAINING = {
    "steps": 6,
    "batch_size": 8,
    "precision": "fp32",
    "clip_norm": 0.5,
    "optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "schedule": {"kind": "linear", "warmup_steps": 2},
    "log_every": 1,
    "validate_every": 3,
    "picture_every": 3,
    "checkpoint": {"every": 3},
}
STAGES = (0, 1, 2, 3)
RESUMED = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), *(("bf16", stage) for stage in STAGES)]


KINDS = {f"{module}/{kind}" for module in ("model", "discriminator") for kind in ("weight", "exp_avg", "exp_avg_sq")}
KINDS |= {"model/ema", "model/buffer"}


def whole_state(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by key."""
    reader = CheckpointReader(complete_checkpoints(run.checkpoints)[-1])
    return {key: reader.tensor(key) for key in reader.index}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def last_weights(run: Run) -> dict[str, torch.Tensor]:
    return checkpoint_weights(complete_checkpoints(run.checkpoints)[-1], ema=False)


def checkpoint_weights(folder: Path, ema: bool) -> dict[str, torch.Tensor]:
    """What an export of a checkpoint would hold."""
    weights = CheckpointWeights(folder, ema)
    found = {name: torch.empty(shape, dtype=weights.types[name]) for name, shape in weights.shapes.items()}
    for name, tensor in found.items():
        weights.fill(name, 0, tensor.view(-1))
    return found


def trial(run: str, **changes) -> dict:
    training = {**copy.deepcopy(TRAINING), **changes.pop("training", {})}
    return {"run": run, "training": training, **changes}


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same training written out in plain PyTorch."""
    training = TrainingConfig.model_validate(TRAINING)
    torch.manual_seed(0)
    model = ToyModel(0.0)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    losses = []
    for step in range(training.steps):
        batch = stack(list(range(step * 8, step * 8 + 8)))
        error = (model(batch["x"]) - batch["y"]) * batch["mask"]
        loss = error.square().sum() / batch["mask"].sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * learning_rate_factor(training.schedule, step, training.steps)
        optimizer.step()
    return losses, model.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """Everything that needs two ranks (and the same in one), each started once."""
    trials = [trial(f"stage{stage}", training={"zero_stage": stage}) for stage in STAGES]
    trials += [
        trial(f"stage{stage}_accumulated", training={"zero_stage": stage, "micro_batch_size": 1}) for stage in STAGES
    ]
    for precision, stage in RESUMED:
        settings = {"zero_stage": stage, "precision": precision}
        name = f"{precision}_{stage}"
        settings["ema_decay"] = 0.9
        trials.append(trial(f"{name}_whole", training=settings, dropout=0.5, rich=True))
        trials.append(trial(f"{name}_resumed", training=settings, dropout=0.5, rich=True, until=4))
        trials.append(trial(f"{name}_resumed", training=settings, dropout=0.5, rich=True))
    out = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        out[ranks] = folder, run_ranks(trials, folder, ranks)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("suffix", ["", "_accumulated"])
def test_losses_and_weights_equal_plain_pytorch(runs, reference, ranks, stage, suffix):
    folder, _ = runs[ranks]
    run = Run(folder / f"stage{stage}{suffix}")
    losses = [row["loss"] for row in run.metrics() if row["split"] == "train"]
    assert losses == pytest.approx(reference[0], rel=1e-5)
    weights = last_weights(run)
    for name, expected in reference[1].items():
        if name != "mark":
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [f"{precision}_{stage}" for precision, stage in RESUMED])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(runs, name, ranks):
    folder, results = runs[ranks]
    stopped = [result for result in results if result["stopped"]]
    assert [result["step"] for result in stopped] == [4] * len(RESUMED)
    whole, resumed = (Run(folder / f"{name}_{kind}") for kind in ("whole", "resumed"))
    states, again = (whole_state(run) for run in (whole, resumed))
    assert {key.rsplit("/", 1)[0] for key in states} == KINDS
    assert_same_bits(states, again)
    rows, rows_again = ([repeatable(row) for row in run.metrics()] for run in (whole, resumed))
    assert rows == rows_again


def test_so_does_one_of_three_ranks_whose_sums_depend_on_their_order(tmp_path):
    settings = {"steps": 8, "batch_size": 12, "zero_stage": 2}
    whole, resumed = (trial(name, training=settings, rich=True) for name in ("whole", "resumed"))
    run_ranks([whole, {**resumed, "until": 4}, resumed], tmp_path, 3)
    assert_same_bits(*(whole_state(Run(tmp_path / name)) for name in ("whole", "resumed")))


def test_buffers_are_rank_0s_on_every_rank(runs):
    assert runs[2][1][0]["marks"] == [[0, 0, 0], [0, 0, 0]]


def test_checkpoint_folder_holds_what_design_says(runs):
    folder, _ = runs[2]
    checkpoints = folder / "stage3" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["step_00000003", "step_00000006"]
    assert (checkpoints / "latest").read_text() == "step_00000006\n"
    newest = checkpoints / "step_00000006"
    names = {path.name for path in newest.iterdir()}
    kinds = {"rank": "safetensors", "random": "pt"}
    files = {f"{kind}_{rank:05d}.{ending}" for kind, ending in kinds.items() for rank in (0, 1)}
    assert names == {"COMPLETE", "state.json", "index.json"} | files
    assert len({path.stat().st_mode for path in newest.iterdir()}) == 1  # whoever may read one may read all
    state = json.loads((newest / "state.json").read_text())
    assert (state["step"], state["samples_consumed"], state["world_size"], state["zero_stage"]) == (
        6,
        {"toy": 48},
        2,
        3,
    )


def test_what_any_rank_quarantined_is_known_to_a_resumed_run(tmp_path):
    trials = [trial("run", until=4, quarantine=True), trial("run"), trial("unequal", unequal=True)]
    _, resumed, unequal = run_ranks(trials, tmp_path, 2)
    assert (resumed["unequal"], unequal["unequal"]) == ([], ["model/buffer/mark"])
    both = {"met by rank 0": "its worker died", "met by rank 1": "its worker died"}
    assert resumed["quarantined"] == both
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert state["quarantined"] == both
    assert state["samples_consumed"] == {"toy": 32}  # what was drawn for the step that did not happen is not counted


def test_refusals_leave_the_run_as_it_was(tmp_path):
    run_ranks([trial("run", training={"zero_stage": 1})], tmp_path, 1)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    changed = {"training": {"zero_stage": 1, "optimizer": {"lr": 0.5}}}
    with pytest.raises(AssertionError, match=r"was saved under another config \(training.optimizer.lr: 0.01 → 0.5\)"):
        run_ranks([trial("run", **changed)], tmp_path, 1)
    diverging = {"optimizer": {"lr": 1e38}, "clip_norm": None, "schedule": {"kind": "constant"}}
    with pytest.raises(AssertionError, match=r"state of step 2 is not finite and not saved: .*model/weight/first.bias"):
        run_ranks([trial("diverged", until=2, training=diverging)], tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
    assert not list((tmp_path / "diverged").glob("checkpoints/*"))


def test_batches_that_do_not_divide_name_those_that_do():
    with pytest.raises(UsageError, match="among 3 ranks: 1, 2, 4 or 8 would do; or a batch_size of 6 or 9"):
        TrainingConfig(steps=1, batch_size=8).accumulation_steps(3)
    with pytest.raises(UsageError, match="micro_batch_size 3 does not divide the 4 samples"):
        TrainingConfig(steps=1, batch_size=8, micro_batch_size=3).accumulation_steps(2)
    assert TrainingConfig(steps=1, batch_size=8, micro_batch_size=2).accumulation_steps(2) == 2
