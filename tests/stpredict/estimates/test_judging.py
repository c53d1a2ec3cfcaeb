"""What a discriminator and a perceptual network are said to take, against those that do it."""

import pytest
import torch

from benchmarks.estimates import JUDGED, R1, estimated, estimated_checkpoint, made_real, measure
from stpredict.estimates.communication import of_discriminator
from stpredict.estimates.disk import disk_of
from stpredict.estimates.duration import Utilization
from stpredict.estimates.gpus import find_gpu
from stpredict.estimates.judging import flop_counter
from stpredict.estimates.machine import Machine
from stpredict.estimates.memory import MemoryEstimator
from stpredict.estimates.planned import Planned
from stpredict.estimates.shapes import modules
from stpredict.estimates.size import size_of
from stpredict.estimates.ways import Ways
from stpredict.losses.config import AdversarialLossConfig
from stpredict.losses.patch_gan import PatchDiscriminator
from stpredict.training.task import weighted
from tests.stpredict.estimates.planned import SMALL_TOKENIZER, planned_tokenizer


def planned(loss: dict, **training) -> Planned:
    return planned_tokenizer(loss=loss, training=training, **SMALL_TOKENIZER)


def flops_of_a_step(one: Planned) -> tuple[int, int, int]:
    """Of two samples, in real tensors: the model's step, the discriminator's, and that with R1."""
    task = one.task
    for module in modules(task):
        made_real(module)
    batch, found = {"clip": torch.zeros(2, 9, 32, 32, 3, dtype=torch.uint8)}, []
    counts = task.counts(batch)
    with flop_counter() as counter:
        loss = weighted(task.training_step(task.model, batch), task.weights, counts)
        if task.discriminator is not None:
            task.discriminator.requires_grad_(False)
            loss += weighted(task.adversarial_step(task.discriminator, batch), task.adversarial_weights, counts)
            task.discriminator.requires_grad_(True)
        loss.backward()
    found.append(counter.get_total_flops())
    for update in (1, 0) if task.discriminator is not None else ():
        batch["reconstruction"] = batch["reconstruction"].detach()
        with flop_counter() as counter:
            sums = task.discriminator_step(task.discriminator, batch, update)
            weighted(sums, task.discriminator_weights, counts).backward()
        found.append(counter.get_total_flops())
    return tuple([*found, 0, 0][:3])


@pytest.mark.parametrize("loss", [R1, {"perceptual": {}}], ids=["random features, R1", "LPIPS"])
def test_flops_are_those_of_a_step(loss):
    plain, judged = planned({}), planned(loss)
    judging, size = judged.judging, size_of(judged)
    assert plain.judging is None
    alone, _, _ = flops_of_a_step(plain)
    model, discriminator, with_r1 = flops_of_a_step(judged)
    assert judging.model_flops == pytest.approx((model - alone) / 2, rel=1e-6)
    assert judging.discriminator_flops == pytest.approx(discriminator / 2, rel=1e-6)
    assert judging.discriminator_flops + judging.r1_flops == pytest.approx(with_r1 / 2, rel=1e-6)
    assert size.flops_forward + size.flops_backward + judging.model_flops == pytest.approx(model / 2, rel=0.01)


def test_a_step_has_them_as_often_as_each_side_learns():
    loss = {"adversarial": {**R1["adversarial"], "r1_every": 4}, "perceptual": {}}
    always, seldom = planned(loss).judging, planned(loss, discriminator={"every": 2}).judging
    rarely = planned(loss, discriminator={"model_every": 2})
    updates = always.discriminator_flops + always.r1_flops / 4
    assert always.flops == pytest.approx(always.model_flops + updates)
    assert seldom.flops == pytest.approx(always.model_flops + updates / 2)
    # In every other step the model's losses are computed without going back, the networks' too.
    assert updates + always.model_flops / 2 < rarely.judging.flops < updates + always.model_flops
    machine, times = Machine(find_gpu("a100-80g"), 1, 2, 25), []
    for one in (planned({}), planned(loss), rarely):
        ways = Ways(one, 3e9, Utilization(0.5), with_memory=False)
        times.append(ways.way(machine, one.config.training).time)
    plain, time, of_rarely = times
    assert time.judging_s == pytest.approx(2 * always.flops / (0.5 * 156e12))  # two samples a rank, in TF32
    assert time.step_s - plain.step_s > time.judging_s  # which gradients are sent after
    assert of_rarely.computation_s == pytest.approx(plain.computation_s * 2 / 3)


def test_the_discriminator_is_counted_as_it_is_built():
    one = planned(JUDGED)
    config = AdversarialLossConfig(**JUDGED["adversarial"])
    built = sum(p.numel() for p in PatchDiscriminator(config.discriminator, 3).parameters())
    assert one.judging.parameters == built
    assert size_of(one).parameters == size_of(planned({})).parameters
    training = one.config.training
    (sent,) = of_discriminator(one.task.discriminator, training, 4)
    assert (sent.kind, sent.tensor_bytes, sent.beside) == ("all-reduce", 4 * built, None)
    assert of_discriminator(one.task.discriminator, training, 1) == []
    added = disk_of(one, training, 2).checkpoint - disk_of(planned({}), training, 2).checkpoint
    assert added == pytest.approx(12 * built, rel=0.02)


def trial(precision: str, stage: int, policy: str = "none", **more) -> dict:
    training = {"precision": precision, "zero_stage": stage, "activation_checkpointing": {"policy": policy}}
    return {"model": "tokenizer_gan", "training": training | more.pop("training", {}), **more}


WIDE = {"adversarial": {**R1["adversarial"], "discriminator": {"channels": 64, "layers": 3, "groups": 8}}}
ADAPTIVE = {"discriminator": {"adaptive_weight": True}}
TRIALS = {  # ranks, the moment at which they take most, and what is trained
    "one rank, ZeRO-0, fp32": (1, "backward", trial("fp32", 0)),
    "ZeRO-2, fp32": (2, "backward", trial("fp32", 2)),
    "ZeRO-2, bf16, 2 micro-batches": (2, "backward", trial("bf16", 2, accumulation=2)),
    "ZeRO-0, bf16, adaptive weight": (2, "backward", trial("bf16", 0, training=ADAPTIVE)),
    "ZeRO-2, bf16, layers, R1": (2, "discriminator", trial("bf16", 2, "layers", loss=WIDE)),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    found = {}
    for ranks in (1, 2):
        names = [name for name, (wanted, _, _) in TRIALS.items() if wanted == ranks]
        found |= zip(names, measure([TRIALS[name][2] for name in names], ranks), strict=True)
    return found


@pytest.mark.parametrize("name", TRIALS)
def test_memory_and_checkpoints_are_those_of_a_training(measured, name):
    ranks, moment, one = TRIALS[name]
    found = estimated(one, ranks)
    assert found.moment == moment
    assert found.total == pytest.approx(measured[name]["memory"], rel=0.15)
    assert estimated_checkpoint(one, ranks) == pytest.approx(measured[name]["checkpoint"], rel=0.01)


def test_what_is_held_for_the_discriminator_is_named():
    one = planned(JUDGED)
    with_all, alone = (MemoryEstimator(p, "cpu").of(p.config.training, 1, 4) for p in (one, planned({})))
    whole = 4 * 5 * one.judging.parameters  # weights, two moments, gradients and DDP's bucket
    assert with_all.moment == "backward"
    assert with_all.discriminator == whole
    assert with_all.networks == 4 * 9 * (3 * 32 + 32 * 64 + 64 * 128)
    assert alone.discriminator == alone.networks == 0
    assert with_all.activations > alone.activations
