import math

import pytest
import torch
from pydantic import ValidationError

from stpredict.losses.adversarial import Hinge, LeCam, NonSaturating, r1_penalty
from stpredict.training.config import DiscriminatorConfig

LOGITS = [-2.0, -0.5, 0.0, 0.5, 3.0]


def test_hinge_is_max_of_0_and_the_margin_of_1():
    logits = torch.tensor(LOGITS)
    assert Hinge.real(logits).tolist() == [3.0, 1.5, 1.0, 0.5, 0.0]
    assert Hinge.fake(logits).tolist() == [0.0, 0.5, 1.0, 1.5, 4.0]
    assert Hinge.model(logits).tolist() == [2.0, 0.5, 0.0, -0.5, -3.0]


def test_non_saturating_is_cross_entropy_and_minus_log_d():
    logits = torch.tensor(LOGITS)
    said = [1 / (1 + math.exp(-x)) for x in LOGITS]  # D, the probability of being real
    assert NonSaturating.real(logits).tolist() == pytest.approx([-math.log(d) for d in said])
    assert NonSaturating.fake(logits).tolist() == pytest.approx([-math.log(1 - d) for d in said])
    assert NonSaturating.model(logits).tolist() == pytest.approx([-math.log(d) for d in said])


def test_lecams_anchors_are_weighted_means_in_which_the_start_has_no_part():
    lecam = LeCam(decay=0.9)
    means = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    for real, fake in means:
        lecam.update(real, fake)
    weights = 0.9 ** torch.arange(6, -1, -1.0)
    torch.testing.assert_close(lecam.anchors, (weights @ means) / weights.sum())


def test_lecam_penalises_logits_beyond_the_others_anchor_and_nothing_before_there_is_one():
    lecam, logits = LeCam(), torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    assert not lecam.real(logits).any()
    assert not lecam.fake(logits).any()
    lecam.update(torch.tensor(1.0), torch.tensor(-0.5))
    torch.testing.assert_close(lecam.real(logits), torch.tensor([0.0, 1.0, 6.25]))  # (logit + 0.5)^2 above -0.5
    torch.testing.assert_close(lecam.fake(logits), torch.tensor([4.0, 0.25, 0.0]))  # (1 - logit)^2 below 1
    (gradient,) = torch.autograd.grad(lecam.real(logits).sum(), logits)
    assert gradient.tolist() == pytest.approx([0.0, 2.0, 5.0])


def test_r1_is_the_squared_gradient_norm_and_can_be_differentiated():
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    real = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = r1_penalty(lambda x: torch.einsum("bi,ij,bj->b", x, matrix, x), real)  # gradient at x: (A + A^T) x
    symmetric = matrix + matrix.T
    expected = (real @ symmetric).square().sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, matrix)[0] for value in (found, expected)))


def test_ratios_by_which_nobody_would_learn_are_refused():
    with pytest.raises(ValidationError, match="every 2 and model_every 3: on some steps nobody would learn"):
        DiscriminatorConfig(every=2, model_every=3)
