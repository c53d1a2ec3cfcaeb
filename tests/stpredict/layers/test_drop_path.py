import pytest
import torch

from stpredict.layers.drop_path import DropPath


def test_a_sample_is_left_out_as_a_whole_or_kept_and_made_up_for():
    ratio = DropPath(0.25)(torch.ones(200, 3, 2, 2))
    assert ratio.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert all(len(sample.unique()) == 1 for sample in ratio)


def test_the_expectation_stays():
    torch.manual_seed(0)
    n, rate = 100_000, 0.3
    mean = DropPath(rate)(torch.ones(n, 1)).mean().item()
    assert mean == pytest.approx(1, abs=5 * (rate / (1 - rate) / n) ** 0.5)  # five standard errors


def test_nothing_happens_in_evaluation_or_at_rate_0():
    x = torch.randn(4, 2)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_what_is_left_out_gets_no_gradient():
    torch.manual_seed(0)
    x = torch.ones(50, 2, requires_grad=True)
    out = DropPath(0.5)(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_probability_below_1_is_refused(rate):
    with pytest.raises(ValueError, match="left out"):
        DropPath(rate)
