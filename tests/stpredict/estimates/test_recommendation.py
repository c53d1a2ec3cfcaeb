"""What is recommended, against cases worked by hand: 16 bytes per parameter in the way that each ZeRO stage divides
them, and as many bytes per sample as the policy keeps."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from launcher.estimates import load_training
from stpredict.estimates import ways
from stpredict.estimates.duration import Sending, StepTime, Utilization
from stpredict.estimates.estimate import Asked, estimate_training
from stpredict.estimates.gpus import find_gpu
from stpredict.estimates.machine import Machine, gpus_of_a_node, node_counts
from stpredict.estimates.memory import Memory
from stpredict.estimates.planned import plan_training
from stpredict.estimates.recommendation import best, reasons
from stpredict.training.computing import ActivationCheckpointingConfig

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
        host = 0
        if training.offload.optimizer == "cpu":  # masters, moments and gradients
            states, host = 2 * p, int(16 * p / n)
        sizes = {**dict.fromkeys(names, 0), "weights": int(states)}
        return Memory("backward", **sizes, activations=activations, host=host)


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
    with pytest.raises(UsageError, match=r"--gpus-per-node 12: .* among them; 1, 2, 4, 8 or 16 would do"):
        ask("nbp_xl_k600.yaml", "a100", gpus_per_node=12)
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


def test_offloading_is_proposed_where_it_helps_with_what_it_costs(monkeypatch):
    found = ask("nbp_3b_k600.yaml", "a100-40g", nodes=1, gpus_per_node=1)
    (said,) = (why for why in found.why if "offload" in why)
    assert said.startswith("or training.offload.optimizer=cpu at ZeRO-2, policy layers: a step of 1.1 times as long")
    assert said.endswith(", 64 GB of each node's own memory")
    too_small = ask("nbp_3b_k600.yaml", "rtx3080", nodes=1, gpus_per_node=1)  # 8 GB of weights, and activations
    monkeypatch.setattr(ByHand, "kept", 100e9)
    too_large = ask("nbp_3b_k600.yaml", "rtx3080", nodes=1, gpus_per_node=1)
    assert any("offload" in why for why in too_small.why)
    assert (too_large.recommended, any("offload" in why for why in too_large.why)) == (None, False)
    monkeypatch.setattr(ByHand, "kept", 2e9)
    sgd = "training.optimizer.kind=sgd"
    assert not any("offload" in why for why in ask("nbp_3b_k600.yaml", "a100-40g", sgd, nodes=1, gpus_per_node=1).why)
    nothing_fits = ask("nbp_3b_k600.yaml", "a100-40g", sgd, nodes=1, gpus_per_node=1)
    assert nothing_fits.recommended is None


def test_an_offloaded_way_takes_its_transfers_and_its_update():
    kept, offloaded = (
        ask("nbp_3b_k600.yaml", "a100", *more, nodes=2).ways for more in ([], ["training.offload.optimizer=cpu"])
    )
    assert [way.training.zero_stage for way in offloaded] == [1, 2, 3]
    one, other = kept[2], offloaded[1]
    assert (one.training.zero_stage, other.training.zero_stage) == (2, 2)
    weights = 4_017_294_336
    moved = (4 + 2) * weights / 16 / 32e9  # gradients and weights of a sixteenth over PCIe gen 4
    extra = other.time.step_s - one.time.step_s
    assert extra == pytest.approx(moved + weights / 2 / 3e9, rel=1e-3)
    assert other.host_bytes == 8 * other.memory.host == pytest.approx(8 * 16 * weights / 16)


def test_recomputation_of_layers_gathers_what_it_runs_again(monkeypatch):
    """At ZeRO-3, of the layers that are recomputed alone."""
    seen = []
    monkeypatch.setattr(ways, "communication", lambda model, recomputed, *_: seen.append(len(recomputed)) or [])
    for policy, every in (("none", 1), ("layers", 1), ("layers", 2)):
        changes = [f"training.activation_checkpointing={{policy: {policy}, every: {every}}}", "training.zero_stage=3"]
        planned = plan_training(load_training(PRIORS / "nbp_xl_k600.yaml", changes))
        machine = Machine(find_gpu("a100"), 1, 8, 25)
        ways.Ways(planned, 1e12, Utilization()).way(machine, planned.config.training)
    layers = len(planned.task.layers())
    assert seen == [0, layers, -(-layers // 2)]


def with_times(way, computation_s, **sending):
    """Of one forward and two backward."""
    return replace(way, time=StepTime(computation_s, computation_s / 3, Sending(**sending)))


@pytest.fixture
def three(monkeypatch):
    """Each ZeRO stage by its number: at 2 and 3 it fits with a rank's eight samples, at 0 not at all."""
    monkeypatch.setattr(ByHand, "kept", 7e9)
    machine, found = (lambda f: (f.machine, f.ways))(ask("nbp_3b_k600.yaml", "a100-80g"))
    return machine, {way.training.zero_stage: way for way in found}


def test_a_way_that_is_said_to_be_faster_is_named_with_why_it_is_not_taken(three):
    machine, ways = three
    last = ways[3]
    exposed, hidden = with_times(ways[2], 1.0, waited_for_s=0.06), with_times(last, 1.0, beside_backward_s=0.05)
    assert best([exposed, hidden]) is exposed
    said = reasons(exposed, [exposed, hidden], machine)
    assert said[1] == (
        "ZeRO-3 with a micro-batch of 8 is predicted 5.7 % faster where all that is sent beside the computation is "
        "hidden, 0.9 % faster where nothing is: the lowest stage is taken of those within 5 %, and it goes without "
        "torch.compile"
    )
    much = with_times(last, 1.0, beside_backward_s=0.2)
    assert best([exposed, much]) is exposed
    assert reasons(exposed, [exposed, much], machine)[1].endswith("is hidden, 13.2 % slower where nothing is")
    slightly = with_times(last, 0.96, waited_for_s=0.06)
    assert "is predicted 3.8 % faster: the lowest stage" in reasons(exposed, [exposed, slightly], machine)[1]
    slower = with_times(last, 1.1)
    assert not any("faster" in why for why in reasons(exposed, [exposed, slower], machine))


def test_smaller_micro_batches_and_recomputation_are_named_as_what_is_avoided(three):
    machine, ways = three
    whole = with_times(ways[2], 1.0)
    layers = {"activation_checkpointing": ActivationCheckpointingConfig(policy="layers"), "zero_stage": 1}
    recomputes = with_times(replace(whole, training=whole.training.model_copy(update=layers)), 0.97)
    assert best([whole, recomputes]) is whole
    assert reasons(whole, [whole, recomputes], machine)[1].endswith("faster: it computes again what fits without")
    in_halves = replace(whole, training=whole.training.model_copy(update={"micro_batch_size": 4}))
    assert best([recomputes, in_halves]) is in_halves  # of two micro-batches, which recompute nothing
    halves = replace(whole, training=whole.training.model_copy(update={"zero_stage": 1, "micro_batch_size": 2}))
    halves = with_times(halves, 0.97)
    assert best([whole, halves]) is whole
    said = reasons(whole, [halves, whole], machine)[1]
    assert said.endswith("faster: its 4 micro-batches have smaller, slower kernels, which are not in the time")


def test_ways_farther_apart_than_five_percent_are_not_alike(three):
    _, ways = three
    fast, slow = ways[3], ways[2]
    assert best([with_times(fast, 1.0), near := with_times(slow, 1.04)]) is near
    assert best([least := with_times(fast, 1.0), with_times(slow, 1.06)]) is least
    too_much = replace(slow.memory, weights=10**11)
    assert best([replace(with_times(slow, 1.0), memory=too_much)]) is None


def test_where_steps_are_too_short_to_tell_the_lowest_stage_is_taken(three):
    machine, ways = three
    low, high = with_times(ways[2], 0.01, waited_for_s=0.003), with_times(ways[3], 0.01)
    assert best([high, low]) is low
    said = reasons(low, [low, high], machine)
    assert said[1] == "steps as short as these say nothing about which way is faster: the lowest stage is taken"
    assert not any("predicted" in why for why in said)


def test_zero_0_is_said_to_keep_fp32_weights_and_zero_3_to_go_without_compilation(monkeypatch):
    in_bf16 = ask("nbp_xl_k600.yaml", "a100-80g").why
    assert any("on every GPU, its weights in fp32, of which autocast makes copies" in why for why in in_bf16)
    in_fp32 = ask("nbp_xl_k600.yaml", "a100-80g", "training.precision=fp32").why
    assert any("on every GPU, so nothing" in why for why in in_fp32)
    assert not any("torch.compile" in why for why in in_fp32)
    monkeypatch.setattr(ByHand, "kept", 14e9)
    at_3 = ask("nbp_3b_k600.yaml", "v100-16g", "training.precision=fp16", nodes=1)
    assert not at_3.recommended.compiled
    assert any("torch.compile is off at ZeRO-3" in why for why in at_3.why)


def test_what_goes_without_compilation_is_not_proposed_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(ByHand, "kept", 40e9)
    compiled = "training.compile=true"
    policies = [{way.policy for way in ask("nbp_xl_k600.yaml", "a100", *more).ways} for more in ([], [compiled])]
    assert policies == [{"none", "selective", "layers"}, {"none", "layers"}]
