"""Checkpoints continued by another number of ranks and at another ZeRO stage: nothing of the state is lost."""

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from stpredict.run import Run
from stpredict.training.checkpoint import complete_checkpoints, read_state
from stpredict.training.restoring import CheckpointReader
from tests.distributed.test_engine import assert_same_bits, trial
from tests.distributed.toy import run_ranks

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
SAVED = [(precision, stage) for precision, stages in STAGES.items() for stage in stages]
CHANGES = [(p, a, b, ranks) for p, stages in STAGES.items() for a, b in product(stages, stages) for ranks in (1, 3)]
# Ranks and last step of each part of a training that is interrupted three times.
PARTS = ((2, 6), (1, 12), (3, 18), (2, 24))
# The stages of its parts: the same throughout, and all of them in turn.
CHAINS = [(stage,) * 4 for stage in STAGES["fp32"]] + [(0, 3, 1, 2), (3, 0, 2, 1)]


def setting(stage: int, precision: str = "fp32") -> dict:
    return {
        "steps": 24,
        "batch_size": 12,
        "zero_stage": stage,
        "precision": precision,
        "ema_decay": 0.9,
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "checkpoint": {"every": 100},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything here, in one start of the ranks for each number of them."""
    out = tmp_path_factory.mktemp("elastic")
    saved = [trial(f"{p}_{stage}", training=setting(stage, p), rich=True, until=3) for p, stage in SAVED]
    whole = [trial(f"whole_{stage}", training=setting(stage), rich=True) for stage in STAGES["fp32"]]
    for part, (ranks, until) in enumerate(PARTS):
        trials = [trial(f"chain_{c}", training=setting(c[part]), rich=True, until=until) for c in CHAINS]
        trials += saved + whole if part == 0 else []
        for precision, before, after, size in CHANGES if part in (1, 2) else []:
            if size == ranks:
                name, source = change_name(precision, before, after, size), f"{precision}_{before}"
                settings = setting(after, precision)
                trials.append(trial(name, training=settings, rich=True, copy_of=source, resave=True))
        run_ranks(trials, out, ranks)
    return out


def change_name(precision: str, before: int, after: int, ranks: int) -> str:
    return f"{precision}_{before}_as_{after}_on_{ranks}"


def tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(complete_checkpoints(checkpoints)[-1])
    return {key: reader.tensor(key) for key in reader.index}


@pytest.mark.parametrize(("precision", "before", "after", "ranks"), CHANGES)
def test_the_whole_state_survives_a_change_of_ranks_and_stage_to_the_bit(folder, precision, before, after, ranks):
    changed = Run(folder / change_name(precision, before, after, ranks))
    source = Run(folder / f"{precision}_{before}").checkpoints
    assert_same_bits(tensors(source), tensors(changed.path / "resaved"))
    then, now = (read_state(complete_checkpoints(path)[-1]) for path in (source, changed.path / "resaved"))
    assert (now.world_size, now.zero_stage) == (ranks, after)
    assert (now.step, now.optimizer_steps, now.samples_consumed) == (3, {"model": 3, "discriminator": 3}, {"toy": 36})
    assert then.optimizer_steps == now.optimizer_steps


@pytest.mark.parametrize("chain", CHAINS)
def test_a_training_continued_by_1_3_and_2_ranks_follows_the_uninterrupted_one(folder, chain):
    whole, parts = (
        {row["step"]: row for row in run.metrics() if row["split"] == "train"}
        for run in (Run(folder / f"whole_{chain[0]}"), Run(folder / f"chain_{chain}"))
    )
    assert list(parts) == list(range(1, 25))
    for (_, until), (ranks, _) in pairwise(PARTS):
        first = until + 1
        for term in ("l2", "told", "deceived"):
            assert parts[first][term] == pytest.approx(whole[first][term], rel=1e-6), (ranks, term)
    for step, row in parts.items():
        assert row["loss"] == pytest.approx(whole[step]["loss"], rel=1e-4), step
    ours, theirs = (tensors(Run(folder / name).checkpoints) for name in (f"chain_{chain}", f"whole_{chain[0]}"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_random_states_begin_anew_where_there_are_other_ranks_and_it_is_said(folder):
    chain = Run(folder / f"chain_{CHAINS[0]}")
    assert read_state(complete_checkpoints(chain.checkpoints)[-1]).world_size == 2
    masks = [torch.load(path, weights_only=True)["torch"] for path in chain.checkpoints.glob("step_*/random_*.pt")]
    assert len({bytes(mask.numpy()) for mask in masks}) == len(masks)
