"""Time, against sums done by hand."""

import json

import pytest

from data_pipeline.errors import UsageError, UserError
from stpredict.estimates.communication import Collective
from stpredict.estimates.duration import StepTime, assumed, bandwidth, measured, step_time, work
from stpredict.estimates.gpus import find_gpu
from stpredict.estimates.several import makespan_s
from stpredict.training.computing import ActivationCheckpointingConfig

NOTHING = ActivationCheckpointingConfig()
LAYERS = ActivationCheckpointingConfig(policy="layers")
A100 = find_gpu("a100-80g")


def test_computation_is_flops_over_what_the_gpus_do():
    flops = 8 * 312e12 * 0.4 * 5  # five seconds of eight
    time = step_time(flops, [], A100, "bf16", 1, 8, 25, assumed(), NOTHING)
    assert (time.computation_s, time.step_s) == (pytest.approx(5), pytest.approx(5))
    again = step_time(flops, [], A100, "bf16", 1, 8, 25, assumed(), LAYERS)
    assert again.computation_s == pytest.approx(5 * 4 / 3)
    assert work(ActivationCheckpointingConfig(policy="layers", every=2)) == pytest.approx(7 / 6)


def test_links_of_a_node_and_between_nodes():
    assert bandwidth(A100, 1, 8, 25) == 300e9
    assert bandwidth(A100, 2, 8, 25) == 200e9  # eight rings over eight cards
    assert bandwidth(A100, 2, 8, 100) == 300e9
    assert bandwidth(A100, 2, 1, 25) == 25e9


def test_hidden_communication_shows_where_it_is_longer_and_exposed_always():
    sent = [Collective("a", "all-gather", 600e9 * 8 / 7, True), Collective("b", "all-gather", 300e9 * 8 / 7, False)]
    time = step_time(312e12 * 8 * 0.4, sent, A100, "bf16", 1, 8, 25, assumed(), NOTHING)
    assert (time.hidden_s, time.exposed_s) == (pytest.approx(2), pytest.approx(1))
    assert time.step_s == pytest.approx(3)  # one of computation beside two of communication
    assert StepTime(5, 2, 1, False).step_s == 6
    assert StepTime(5, 2, 1, True).step_s == 5  # a measured MFU has it in it


def test_a_measured_mfu_is_the_median_and_knows_its_own_recomputation(tmp_path):
    rows = [{"step": n, "mfu": mfu} for n, mfu in enumerate((0.1, 0.3, 0.31))] + [{"step": 3, "split": "val"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = measured(tmp_path, LAYERS)
    assert (found.mfu, found.source) == (0.3, "measured")
    flops = 8 * 312e12 * 0.3
    same = step_time(flops, [], A100, "bf16", 1, 8, 25, found, LAYERS)
    assert same.computation_s == pytest.approx(1)
    assert step_time(flops, [], A100, "bf16", 1, 8, 25, found, NOTHING).computation_s == pytest.approx(3 / 4)


def test_a_run_without_mfu_and_an_mfu_above_one_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no metrics.jsonl"):
        measured(tmp_path, NOTHING)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="has no mfu, as on a CPU"):
        measured(tmp_path, NOTHING)
    with pytest.raises(UsageError, match=r"--mfu 1.2: a share"):
        assumed(1.2)


def test_trials_at_once():
    assert makespan_s([4, 3, 2, 1], 4) == 4
    assert makespan_s([4, 3, 2, 1], 2) == 5  # 4, then 1 beside 3 and 2
    assert makespan_s([4, 3, 2, 1], 1) == 10
