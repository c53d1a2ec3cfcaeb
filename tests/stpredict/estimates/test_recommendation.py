"""What is recommended, against cases worked by hand: 16 bytes per parameter in the way that each ZeRO stage divides
them, and as many bytes per sample as the policy keeps."""

from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from launcher.estimates import load_training
from stpredict.estimates import ways
from stpredict.estimates.duration import Utilization
from stpredict.estimates.estimate import Asked, estimate_training
from stpredict.estimates.gpus import find_gpu
from stpredict.estimates.machine import gpus_of_a_node, node_counts
from stpredict.estimates.memory import Memory
from stpredict.estimates.planned import plan_training

PRIORS = Path("configs/priors")


class ByHand:
    """bf16: weights 2, gradients 4, masters and moments 12 bytes per parameter; at ZeRO-0 4, and 12 for gradients and
    moments. ``kept`` bytes per sample without recomputation, a tenth with ``layers``, half with ``selective``."""

    kept = 2e9

    def __init__(self, planned, device="cuda"):
        self.parameters = sum(p.numel() for p in planned.task.model.parameters())

    def of(self, training, ranks, micro_batch):
        p, n = self.parameters, ranks
        states = {
            0: 16 * p,
            1: 6 * p + 12 * p / n,
            2: 2 * p + 16 * p / n,
            3: 18 * p / n,
        }[training.zero_stage]
        share = {"none": 1, "selective": 0.5, "layers": 0.1}[training.activation_checkpointing.policy]
        activations = int(micro_batch * share * self.kept)
        names = ("weights", "masters", "moments", "gradients", "averages", "buffers", "buckets", "gathered")
        return Memory("backward", **{**dict.fromkeys(names, 0), "weights": int(states)}, activations=activations)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setattr(ways, "MemoryEstimator", ByHand)


def ask(config: str, gpu: str, *overrides: str, **asked):
    planned = plan_training(load_training(PRIORS / config, overrides))
    return estimate_training(planned, Asked(Utilization(), find_gpu(gpu), "asked for", **asked))


def chosen(found) -> tuple:
    way = found.recommended
    return found.machine.nodes, way.training.zero_stage, way.training.micro_batch_size, way.policy


def test_876_million_parameters_on_eight_a100s_need_nothing_divided():
    found = ask("nbp_xl_k600.yaml", "a100-80g")
    assert chosen(found) == (1, 0, 8, "none")  # 14 + 16 of 77 GB
    assert found.recommended.overrides == [
        "resources.processes=8",
        "training.zero_stage=0",
        "training.micro_batch_size=8",
        "training.activation_checkpointing.policy=none",
    ]


def test_876_million_parameters_on_40_gib_take_a_higher_stage_where_activations_fill_them(monkeypatch):
    """Of 38.7 GB. With 2 GB a sample ZeRO-0 has 14.0 + 16; with 4.2 it has 14.0 + 33.6, ZeRO-1 6.6 + 33.6, and ZeRO-2
    3.5 + 33.6."""
    assert chosen(ask("nbp_xl_k600.yaml", "a100-40g")) == (1, 0, 8, "none")
    monkeypatch.setattr(ByHand, "kept", 4.2e9)
    found = ask("nbp_xl_k600.yaml", "a100-40g")
    assert chosen(found) == (1, 2, 8, "none")
    assert "ZeRO-2: the lowest that fits with a micro-batch of 8; ZeRO-1 has room for 4" in found.why


def test_3_billion_parameters_on_16_gib_need_zero_3_and_recomputation(monkeypatch):
    """Of 15.5 GB, on eight: ZeRO-2 has 8.0 + 8.0 before any activation, ZeRO-3 9.0. A sample of 14 GB, or 7, does not
    fit beside that; four of 1.4 do."""
    monkeypatch.setattr(ByHand, "kept", 14e9)
    found = ask("nbp_3b_k600.yaml", "v100-16g", "training.precision=fp16", nodes=1)
    assert chosen(found) == (1, 3, 4, "layers")
    assert not any(way.fits for way in found.ways if way.training.zero_stage < 3)
    assert "ZeRO-3: the lowest that fits; ZeRO-2 takes 17 of 15 GB with a micro-batch of 1" in found.why
    assert "activation_checkpointing.policy layers: without, a micro-batch of 1 takes 23 GB" in found.why


def test_the_fewest_nodes_that_hold_it_are_taken():
    found = ask("nbp_3b_k600.yaml", "rtx3080", "training.precision=fp16")
    # Of 9.7 GB: 72 GB of states leave room for a sample with recomputation on eight; on one no stage below 3 fits.
    assert chosen(found)[:2] == (1, 3)
    assert ask("nbp_3b_k600.yaml", "rtx3080", "model.layers=40", "training.precision=fp16").machine.nodes == 2


def test_what_does_not_fit_is_said_with_the_nearest_that_does():
    found = ask("nbp_3b_k600.yaml", "rtx3080", "model.layers=40", "training.precision=fp16", nodes=1)
    assert found.recommended is None
    text = "\n".join(found.why)
    assert "nothing fits 1 node x 8 of NVIDIA GeForce RTX 3080: the least, ZeRO-3, policy layers" in text
    assert "nearest that would: 2 nodes x 8" in text
    assert "or GPUs with 15 GiB (--gpu t4)" in text
    in_bf16 = ask("nbp_3b_k600.yaml", "rtx3080", "model.layers=40", nodes=1)
    assert any("or GPUs with" in line for line in in_bf16.why)
    assert not any("t4" in line or "v100" in line for line in in_bf16.why)  # which have none


@pytest.mark.parametrize("config", ["nbp_xl_k600.yaml", "nbp_xxl_k600.yaml", "nbp_3b_k600.yaml"])
def test_a_training_takes_the_overrides_of_its_recommendation(config):
    """Also where the config itself is for more ranks."""
    found = ask(config, "a100-80g")
    pasted = load_training(PRIORS / config, found.recommended.overrides)
    pasted.check_ranks(pasted.resources.processes)
    assert pasted.resources.processes == found.machine.ranks


def test_the_disk_is_that_of_the_budgets_steps():
    few, many = (ask("nbp_xl_k600.yaml", "a100-80g", tokens=tokens).disk for tokens in (1e9, 300e9))
    assert many.checkpoints - few.checkpoints == int(300e9 / 64 / 1280) // 50_000  # keep_every; 1e9 has none of these


def test_a_deadline_takes_as_many_nodes_as_it_needs():
    on_one = ask("nbp_xl_k600.yaml", "a100-80g", days=3)
    assert (on_one.machine.nodes, len([why for why in on_one.why if "within 3 days" in why])) == (1, 1)
    faster = ask("nbp_xl_k600.yaml", "a100-80g", days=1)
    assert faster.machine.nodes == 4  # 2.3 days on one; two are not enough
    assert faster.budget.days(faster.recommended.time.step_s) <= 1
    never = ask("nbp_xl_k600.yaml", "a100-80g", days=0.01)
    assert never.machine.nodes == 8
    assert any("still more than 0.01 days" in why for why in never.why)


def test_zero_1_is_taken_where_zero_2_would_communicate_for_every_micro_batch(monkeypatch):
    """On PCIe, 16 samples a rank of which one fits: ZeRO-2 all-reduces 16 times a step."""
    monkeypatch.setattr(ByHand, "kept", 24e9)
    found = ask("nbp_xl_k600.yaml", "a100-pcie", "training.batch_size=32", nodes=1, gpus_per_node=2)
    alike = {way.training.zero_stage: way for way in found.ways if way.policy == "none"}
    assert alike[1].training.micro_batch_size == alike[2].training.micro_batch_size == 2
    assert alike[2].sent_bytes > 6 * alike[1].sent_bytes
    assert found.recommended.training.zero_stage < 2


def test_nodes_share_the_batch_evenly():
    assert node_counts(64, 8) == [1, 2, 4, 8]
    assert node_counts(48, 8) == [1, 2, 3, 6]
    assert node_counts(8, 8) == [1]


def test_a_batch_that_does_not_divide_is_refused_with_what_would_do():
    with pytest.raises(UsageError, match=r"--gpus-per-node 6: training.batch_size 64 does not divide"):
        ask("nbp_xl_k600.yaml", "a100", gpus_per_node=6)
    with pytest.raises(UsageError, match=r"--nodes 3: .*does not divide among 3 nodes; 1, 2, 4, 8, 16, 32 or 64 would"):
        ask("nbp_xl_k600.yaml", "a100", nodes=3)
    with pytest.raises(UsageError, match=r"--gpus-per-node 8: .* on 16 nodes; 1, 2 or 4 would do"):
        ask("nbp_xl_k600.yaml", "a100", nodes=16, gpus_per_node=8)


def test_a_node_has_eight_gpus_or_the_most_that_share_the_batch():
    assert [gpus_of_a_node(64, nodes, None) for nodes in (None, 1, 8, 16, 64)] == [8, 8, 8, 4, 1]
    assert [gpus_of_a_node(batch, None, None) for batch in (6, 12, 7, 1)] == [6, 6, 7, 1]
    assert gpus_of_a_node(64, 4, 16) == 16


def test_tokens_decide_the_steps():
    found = ask("nbp_xl_k600.yaml", "a100", tokens=300e9)
    assert found.budget.steps == round(300e9 / (64 * 1280))
    assert found.budget.tokens == pytest.approx(300e9, rel=1e-4)
