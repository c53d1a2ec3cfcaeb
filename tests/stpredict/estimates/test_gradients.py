"""Gradients and their buckets by hand; test_planned_memory holds them to trainings. Files and functions that are named
are DeepSpeed 0.19's, in runtime/."""

import numpy as np
import pytest

from stpredict.estimates.gradients import Gradients
from tests.stpredict.estimates.planned import SMALL_PRIOR, planned_prior

# Elements whose gradients are finished, from moment to moment: tensors of 3, 4 and 5 elements.
FINISHED = np.array([0.0, 3, 3, 7, 12, 12])
# Elements of SMALL_PRIOR: of matrices, in order, and of its norms; of all, of a quarter, of the largest.
LAYER = [192 * 64, 64 * 64, 384 * 64, 64 * 192]
MATRICES, NORMS = [64 * 64, *LAYER, *LAYER, 64 * 64], 5 * 64
ALL, SHARE, LARGEST = 115_008, 28_752, 24_576
OFFLOADED = {"offload": {"optimizer": "cpu"}}


def gradients(stage: int, precision: str, bucket: int = 5, accumulated: bool = False, **training) -> Gradients:
    settings = {"zero_stage": stage, "deepspeed": {"zero_optimization": {"reduce_bucket_size": bucket}}, **training}
    planned = planned_prior(**SMALL_PRIOR, training=settings)
    return Gradients(planned, planned.config.training, precision, 4, accumulated, "cuda")


def test_zero_2_in_bf16_has_a_bucket_in_bf16_and_copies_it_in_both_types():
    found = gradients(2, "bf16")
    kept, buckets = found.in_backward(FINISHED)
    assert list(buckets) == [0, 10, 10, 10 + 6 * 3, 10 + 6 * 4, 10]
    assert list(kept) == [0, 0, 0, *[4 * found.share] * 3]
    (last,) = found.exchanged(FINISHED)
    assert last == (4 * found.share, 10 + 6 * 5)
    assert list(gradients(2, "bf16", accumulated=True).in_backward(FINISHED).gradients) == [4 * found.share] * 6


def test_zero_2_in_one_type_has_its_share_when_the_first_bucket_has_been_reduced():
    found = gradients(2, "fp32")
    kept, buckets = found.in_backward(FINISHED)
    assert list(buckets) == [0, 20, 20, 20 + 4 * 3, 20 + 4 * 4, 20]
    assert list(kept) == [0, 0, 0, 0, *[4 * found.share] * 2]


def test_a_tensor_larger_than_the_bucket_waits_outside():
    kept, buckets = gradients(2, "fp32", bucket=4).in_backward(FINISHED)
    assert list(kept[-2:] - kept[-3] - gradients(2, "fp32").share * 4) == [4 * 5, 4 * 5]
    assert list(buckets) == [0, 16, 16, 16 + 4 * 3, 16 + 4 * 4, 16]


@pytest.mark.parametrize(("stage", "precision", "width"), [(1, "fp16", 4), (1, "fp32", 4), (2, "bf16", 2)])
def test_overlapping_communication_has_two_buckets(stage, precision, width):
    """zero/stage_1_and_2.py, setup_buckets: at both stages."""
    overlapping = {"zero_optimization": {"reduce_bucket_size": 5, "overlap_comm": True}}
    found = gradients(stage, precision, deepspeed=overlapping)
    assert found.in_backward(FINISHED).buckets[1] == 2 * width * 5
    assert found.exchanged(np.array([0.0]))[0].buckets == 2 * width * 5


def test_zero_3_has_its_bucket_and_its_share_always():
    found = gradients(3, "bf16")
    kept, buckets = found.in_backward(FINISHED)
    assert list(buckets) == [20, 20, 20, 20 + 4 * 3, 20 + 4 * 4, 20]
    assert set(kept) == {4 * found.share}
    assert found.before_forward() == (4 * found.share, 20)


def test_zero_1_in_fp16_keeps_its_bucket_until_the_weights_are_updated():
    found = gradients(1, "fp16")
    assert list(found.in_backward(FINISHED).gradients) == [4 * n for n in FINISHED]
    assert [kept.buckets for kept in found.in_update()] == [20, 20]
    assert [kept.buckets for kept in gradients(2, "fp16").in_update()] == [0, 0]


@pytest.mark.parametrize(("stage", "copies"), [(0, 4), (2, 4), (3, 4)])
def test_sgd_with_decay_updates_by_a_copy(stage, copies):
    decaying, plain = (
        max(kept.gradients for kept in gradients(stage, "bf16", optimizer={"kind": "sgd", **decay}).in_update()[-1:])
        for decay in ({"weight_decay": 0.1}, {})
    )
    found = gradients(stage, "bf16")
    assert decaying - plain == pytest.approx(copies * found.decayed / (1 if stage == 0 else 4), abs=copies)


def test_sizes_of_the_small_prior():
    found = gradients(2, "fp32")
    assert (found.matrices, found.all) == (MATRICES, sum(MATRICES) + NORMS)
    assert (found.all, found.share, found.largest) == (ALL, SHARE, LARGEST)


def test_reduced_to_their_owners_a_bucket_is_copied_owner_by_owner():
    """zero/stage_1_and_2.py, average_tensor: slices of one owner are put together and reduced, then those of the next.
    Tensors of two shares each go through a bucket for three; no owner has more than a share of one."""
    finished = np.array([0.0, 2, 2, 4]) * SHARE
    for to_owners, copied in ((True, SHARE), (False, 2 * SHARE)):
        settings = {"reduce_bucket_size": 3 * SHARE, "use_multi_rank_bucket_allreduce": not to_owners}
        found = gradients(2, "bf16", deepspeed={"zero_optimization": settings})
        bucket = 2 * 3 * SHARE
        assert list(found.in_backward(finished).buckets) == [0, bucket, bucket, bucket + (4 + 2) * copied]
        assert found.exchanged(finished) == [(4 * SHARE, bucket + (4 + 2) * copied)]


def test_the_engine_puts_tensors_together_until_they_are_more_than_it_reduces_at_once(monkeypatch):
    """engine.py, allreduce_no_retain: here all that comes before the largest tensor is just not more, so that it is
    added to them. Of less than that, everything is reduced at once."""
    before = MATRICES[0] + 64 + MATRICES[1] + MATRICES[2] + 64
    for at_once, copied in ((before, before + LARGEST), (ALL, ALL)):
        monkeypatch.setattr("stpredict.estimates.gradients.REDUCED_AT_ONCE", at_once)
        assert gradients(0, "fp32").exchanged(FINISHED) == [(4 * ALL, 4 * copied)]


def test_zero_1_in_bf16_reduces_two_tensors_which_are_copied_only_together(monkeypatch):
    """bf16_optimizer.py, get_grads_for_reduction: a flat tensor for weights that decay, and one for others. engine.py,
    allreduce_no_retain: the first alone, if it is more than is reduced at once; _flatten_dense_tensors does not copy a
    single one."""
    for at_once, copied in ((sum(MATRICES), ALL), (sum(MATRICES) - 1, 0)):
        monkeypatch.setattr("stpredict.estimates.gradients.REDUCED_AT_ONCE", at_once)
        assert gradients(1, "bf16").exchanged(FINISHED) == [((4 + 2) * ALL, 4 * copied)]


@pytest.mark.parametrize(("stage", "normed", "bucket"), [(1, LARGEST, 0), (2, LARGEST, 0), (3, LARGEST // 4, 4 * 5)])
def test_norms_are_taken_in_fp64_tensor_by_tensor(stage, normed, bucket):
    """zero/stage_1_and_2.py and stage3.py, get_grad_norm_direct, in zero/utils.py's get_norm_dtype; ZeRO-3 has a
    quarter of each tensor."""
    assert gradients(stage, "fp32").in_update()[0] == (4 * SHARE + 8 * normed, bucket)


def test_zero_3_ends_a_sub_group_with_the_tensor_that_makes_it_large_enough():
    """zero/stage3.py, _create_fp16_sub_groups and _prepare_fp32_grad_for_sub_group. Quarters of MATRICES are 1, 3, 1,
    6, 3, 3, 1, 6, 3 and 1 times 1024. From 8 on: 11, 13, and 4 are left. From 2 on: 4, 7, 3,
    3, 7, 3 and 1. From 14 on: 14 and 14."""
    for at_least, largest in ((8, 13), (2, 7), (14, 14), (28, 28), (29, 28)):
        settings = {"reduce_bucket_size": 5, "sub_group_size": at_least * 1024}
        found = gradients(3, "bf16", deepspeed={"zero_optimization": settings})
        assert found.in_update()[1] == (4 * SHARE + 4 * largest * 1024, 4 * 5)


@pytest.mark.parametrize(("stage", "buckets"), [(1, 4 * 5), (2, 0)])
def test_sums_in_fp32_stay_on_the_device_when_the_optimizer_is_offloaded(stage, buckets):
    """zero/stage_1_and_2.py, _build_compact_grad_partition_buffer: on the accelerator, wherever the masters are; but no
    sums in the weights' type (_use_compact_grad_partition_buffer)."""
    assert gradients(stage, "bf16", **OFFLOADED).in_update() == [(4 * SHARE, buckets)]
    assert gradients(stage, "bf16", accumulation_dtype="bf16", **OFFLOADED).in_update() == [(0, 0)]
    assert gradients(3, "bf16", **OFFLOADED).in_update() == [(0, 4 * 5)]
