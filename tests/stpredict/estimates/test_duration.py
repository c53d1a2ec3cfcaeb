"""Time, against sums done by hand."""

import json
from dataclasses import replace

import pytest

from data_pipeline.errors import UserError
from stpredict.estimates.communication import Collective
from stpredict.estimates.duration import (
    ASSUMED_MFU,
    NETWORK_GB_S,
    Sending,
    StepTime,
    bandwidth,
    median_mfu,
    step_time,
    while_computing,
    work,
)
from stpredict.estimates.gpus import find_gpu
from stpredict.estimates.machine import Machine
from stpredict.estimates.offloading import Transfer
from stpredict.estimates.several import makespan_s
from stpredict.run import Run
from stpredict.training.computing import ActivationCheckpointingConfig

NOTHING = ActivationCheckpointingConfig()
LAYERS = ActivationCheckpointingConfig(policy="layers")
A100 = find_gpu("a100-80g")
NODE = Machine(A100, 1, 8, 25)
RATE = 8 * 312e12 * 0.4  # of eight, at an MFU of 0.4


def of_step(flops: float, sent=(), moved=(), update_s=0.0, recomputing=NOTHING, machine=NODE) -> StepTime:
    return step_time(flops, sent, moved, update_s, machine, "bf16", 0.4, recomputing)


def test_computation_is_flops_over_what_the_gpus_do():
    time = of_step(5 * RATE)
    assert (time.computation_s, time.step_s) == (pytest.approx(5), pytest.approx(5))
    assert time.forward_s == pytest.approx(5 / 3)
    again = of_step(5 * RATE, recomputing=LAYERS)
    assert again.computation_s == pytest.approx(5 * 4 / 3)
    assert again.forward_s == pytest.approx(5 / 3)
    assert work(ActivationCheckpointingConfig(policy="layers", every=2)) == pytest.approx(7 / 6)
    assert work(ActivationCheckpointingConfig(policy="selective")) == 1


def test_defaults_are_those_that_docs_name():
    assert (ASSUMED_MFU, NETWORK_GB_S) == (0.4, 25)


def test_links_of_a_node_and_between_nodes():
    assert bandwidth(A100, 1, 8, 25) == 300e9
    assert bandwidth(A100, 2, 8, 25) == 200e9  # eight rings over eight cards
    assert bandwidth(A100, 2, 8, 100) == 300e9
    assert bandwidth(A100, 2, 1, 25) == 25e9
    assert bandwidth(A100, 2, 1, 400) == 400e9  # a node's only GPU has no use of its NVLink


def test_what_is_sent_takes_its_bytes_over_the_links_speed():
    whole = 8 / 7  # a ring of eight sends seven eighths
    sent = [
        Collective("a", "all-gather", 600e9 * whole, "computation"),
        Collective("b", "all-gather", 300e9 * whole, None),
        Collective("c", "all-reduce", 600e9 * whole, "backward"),
    ]
    moved = [Transfer("d", 320e9, None), Transfer("e", 32e9, "backward"), Transfer("f", 64e9, "computation")]
    time = of_step(RATE, sent, moved, update_s=0.5)  # an A100's PCIe gen 4 has 32 GB/s in a direction
    gpus, host = time.between_gpus, time.with_host
    assert (gpus.waited_for_s, gpus.beside_backward_s, gpus.beside_computation_s) == pytest.approx((1, 4, 2))
    assert (host.waited_for_s, host.beside_backward_s, host.beside_computation_s) == pytest.approx((10, 1, 2))
    assert gpus.total_s == pytest.approx(7)
    assert time.without_overlap_s == pytest.approx(1 + 7 + 13 + 0.5)
    assert time.step_s == pytest.approx(4 + 2 + 1 + 2 + 1 + 10 + 0.5)
    assert of_step(RATE, sent[1:2], machine=Machine(A100, 2, 4, 25)).between_gpus.waited_for_s == pytest.approx(3)


@pytest.mark.parametrize(
    ("gradients", "weights", "step"),
    [
        (2, 1, 3),  # of one forward and two backward: both are hidden
        (2.5, 0, 3.5),  # gradients have the backward pass alone
        (0, 3, 3),
        (0, 4, 4),
        (2.5, 1.5, 4),  # and both one stream
    ],
)
def test_gradients_are_hidden_behind_the_backward_pass_alone(gradients, weights, step):
    assert StepTime(3, 1, Sending(0, gradients, weights)).step_s == step
    assert StepTime(3, 1, Sending(0, gradients, 0), Sending(0, 0, weights)).step_s == step
    assert StepTime(3, 1, Sending(1, gradients, weights), Sending(0.25), 0.5).step_s == step + 1.75


def test_a_runs_mfu_is_the_median_of_its_lines(tmp_path):
    rows = [{"step": n, "mfu": mfu} for n, mfu in enumerate((0.1, 0.3, 0.31))] + [{"step": 3, "split": "val"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert median_mfu(Run(tmp_path)) == 0.3


def test_a_run_without_mfu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no metrics.jsonl"):
        median_mfu(Run(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="has no mfu, as on a CPU"):
        median_mfu(Run(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("step 1\n")
    with pytest.raises(UserError, match="is damaged"):
        median_mfu(Run(tmp_path))


@pytest.mark.parametrize("tokenizing_s", [0, 0.2])
@pytest.mark.parametrize("recomputing", [NOTHING, LAYERS])
@pytest.mark.parametrize(
    ("sent", "update_s"),
    [
        ([], 0),
        ([Collective("a", "all-gather", 300e9, None)], 0.25),
        ([Collective("a", "all-reduce", 240e9, "backward")], 0),
        ([Collective("a", "all-reduce", 450e9, "backward")], 0),  # longer than the backward pass
    ],
)
def test_what_a_run_sent_is_taken_out_of_its_mfu(tmp_path, sent, update_s, recomputing, tokenizing_s):
    """A training that computes at 0.4 says less of its whole steps; from that 0.4 is found again."""
    true = replace(of_step(RATE, sent, (), update_s, recomputing), tokenizing_s=tokenizing_s)
    said = 0.4 / true.step_s  # one second of FLOPs that count
    at_said = step_time(RATE, sent, (), update_s, NODE, "bf16", said, recomputing)
    at_said = replace(at_said, tokenizing_s=tokenizing_s * 0.4 / said)
    assert while_computing(said, at_said, Run(tmp_path)) == pytest.approx(0.4)


def test_a_run_whose_sending_fills_its_steps_tells_no_mfu(tmp_path):
    time = step_time(RATE, [Collective("a", "all-gather", 400e9, None)], (), 0, NODE, "bf16", 0.4, NOTHING)
    said = r"its steps take 1 s, and what they send takes as long"
    with pytest.raises(UserError, match=said):
        while_computing(0.4, time, Run(tmp_path))
    for hidden in (Sending(0, 0.5, 0.6), Sending(0, 1.1, 0), Sending(0, 0, 1.1)):
        with pytest.raises(UserError, match=said):
            while_computing(0.4, StepTime(1, 1 / 3, hidden), Run(tmp_path))


def test_trials_at_once():
    assert makespan_s([4, 3, 2, 1], 4) == 4
    assert makespan_s([4, 3, 2, 1], 2) == 5  # 4, then 1 beside 3 and 2
    assert makespan_s([4, 3, 2, 1], 1) == 10
