"""Gradients and their buckets by hand; test_planned_memory holds them to trainings."""

import numpy as np
import pytest

from stpredict.estimates.gradients import Gradients
from tests.stpredict.estimates.planned import SMALL_PRIOR, planned_prior

# Elements whose gradients are finished, from moment to moment: tensors of 3, 4 and 5 elements.
FINISHED = np.array([0.0, 3, 3, 7, 12, 12])


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


def test_overlapping_communication_has_two_buckets():
    overlapping = {"zero_optimization": {"reduce_bucket_size": 5, "overlap_comm": True}}
    assert gradients(2, "bf16", deepspeed=overlapping).in_backward(FINISHED).buckets[1] == 20


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
