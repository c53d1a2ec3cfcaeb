"""Offload to the host's memory: the same training, resumed to the bit, and switched on and off between starts."""

from pathlib import Path

import pytest

from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints
from stpredict.training.restoring import CheckpointReader
from tests.distributed.test_engine import assert_same_bits, trial, whole_state
from tests.distributed.toy import repeatable, run_ranks

KINDS = {
    "1_optimizer": (1, "bf16", {"optimizer": "cpu"}),
    "3_both": (3, "bf16", {"optimizer": "cpu", "parameters": "cpu"}),
}


def settings(stage: int, precision: str, offload: dict[str, str]) -> dict:
    gathered = {"zero_optimization": {"param_persistence_threshold": 0}} if stage == 3 else {}  # as large ones are
    return {
        "zero_stage": stage,
        "precision": precision,
        "offload": offload,
        "deepspeed": gathered,
        "micro_batch_size": 2,
        "ema_decay": 0.9,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    trials = []
    for name, (stage, precision, offload) in KINDS.items():
        on, off = ({"training": settings(stage, precision, where), "rich": True} for where in (offload, {}))
        trials += [trial(f"{name}_off", **off), trial(f"{name}_on", **on)]
        trials += [trial(f"{name}_resumed", **on, until=4), trial(f"{name}_resumed", **on)]
        trials += [trial(f"{name}_switched", **off, until=3), trial(f"{name}_switched", **on)]
        trials.append(trial(f"{name}_put_on", **on, resave=True, copy_of=f"{name}_off"))
        trials.append(trial(f"{name}_put_off", **off, resave=True, copy_of=f"{name}_on"))
    out = tmp_path_factory.mktemp("offloaded")
    run_ranks(trials, out, 2, timeout_s=500)
    return out


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in Run(run).metrics() if row["split"] == "train"]


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_a_training_without_offload(folder, name):
    without = losses(folder / f"{name}_off")
    for run in ("on", "switched"):
        assert losses(folder / f"{name}_{run}") == pytest.approx(without, rel=1e-3)


def test_validation_with_averages_leaves_nothing_gathered_behind(folder):
    """At ZeRO-3 the next forward pass would compute with the averages."""
    assert losses(folder / "3_both_off") == pytest.approx(losses(folder / "1_optimizer_off"), rel=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(folder, name):
    whole, resumed = (Run(folder / f"{name}_{kind}") for kind in ("on", "resumed"))
    assert_same_bits(whole_state(whole), whole_state(resumed))
    rows = [[repeatable(row) for row in run.metrics()] for run in (whole, resumed)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("saved", "loaded"), [("off", "put_on"), ("on", "put_off")])
def test_nothing_of_the_state_is_lost_where_offload_is_switched(folder, name, saved, loaded):
    saved = complete_checkpoints(folder / f"{name}_{saved}" / "checkpoints")[-1]
    again = complete_checkpoints(folder / f"{name}_{loaded}" / "resaved")[-1]
    readers = map(CheckpointReader, (saved, again))
    assert_same_bits(*({key: reader.tensor(key) for key in reader.index} for reader in readers))
