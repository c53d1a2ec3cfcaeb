"""Activation checkpointing in two processes: the same training, computed twice in part."""

from itertools import product
from pathlib import Path

import pytest

from stpredict.run import Run
from tests.distributed import deep_toy
from tests.distributed.test_engine import STAGES, assert_same_bits, trial, whole_state
from tests.distributed.toy import repeatable, run_ranks

POLICIES = {
    "none": {"policy": "none"},
    "layers": {"policy": "layers"},
    "every_second": {"policy": "layers", "every": 2},
    "selective": {"policy": "selective"},
}
KINDS = [("fp32", stage) for stage in STAGES] + [("bf16", 0), ("bf16", 3)]
RUNS = {"none": [1, 1, 1], "layers": [2, 2, 2], "every_second": [2, 1, 2], "selective": [2, 2, 2]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    trials = []
    for (precision, stage), (name, policy) in product(KINDS, POLICIES.items()):
        settings = {"precision": precision, "zero_stage": stage, "activation_checkpointing": policy, "steps": 3}
        settings["micro_batch_size"] = 2
        if stage == 3:  # small parameters are gathered ahead and released too, as large ones are
            large = {"param_persistence_threshold": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 100}
            settings["deepspeed"] = {"zero_optimization": large}
        trials.append(trial(f"{precision}_{stage}_{name}", training=settings, dropout=0.5))
    out = tmp_path_factory.mktemp("recomputed")
    results = run_ranks(trials, out, 2, timeout_s=400, script=deep_toy.__file__)
    return out, {trial["run"]: result for trial, result in zip(trials, results, strict=True)}


@pytest.mark.parametrize(("precision", "stage"), KINDS)
@pytest.mark.parametrize("policy", ["layers", "every_second", "selective"])
def test_recomputed_training_is_the_same_to_the_bit_and_layers_run_twice(runs, precision, stage, policy):
    out, results = runs
    kept, recomputed = (f"{precision}_{stage}_{name}" for name in ("none", policy))
    assert_same_bits(whole_state(Run(out / kept)), whole_state(Run(out / recomputed)))
    rows = [[repeatable(row) for row in Run(out / name).metrics()] for name in (kept, recomputed)]
    assert rows[0] == rows[1]
    forwards = 3 * 2  # steps, micro-batches
    for name, run in (("none", kept), (policy, recomputed)):
        buffers = results[run]["buffers_after"]
        assert [buffers[f"layers.{n}.runs"][1] for n in range(3)] == [times * forwards for times in RUNS[name]]
        assert [buffers[f"layers.{n}.seen"][1] for n in range(3)] == [forwards] * 3
