import pytest
import torch

from stpredict.layers.drop_path import kept


def test_each_branch_is_left_out_at_its_own_rate_or_made_up_for_so_that_the_expectation_stays():
    rates, n = [0.0, 0.25, 0.7], 100_000
    factors = kept(rates, torch.rand(n, 3, generator=torch.Generator().manual_seed(0)))
    for rate, column in zip(rates, factors.unbind(1), strict=True):
        assert column.unique().tolist() == pytest.approx(sorted({0.0, 1 / (1 - rate)} if rate else {1.0}))
        assert column.mean().item() == pytest.approx(
            1, abs=1e-9 + 5 * (rate / (1 - rate) / n) ** 0.5
        )  # standard errors


def test_branches_of_a_sample_are_left_out_each_by_itself():
    factors = kept([0.5, 0.5], torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.corrcoef(factors.T)[0, 1].abs() < 0.08  # five standard errors


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_probability_below_1_is_refused(rate):
    with pytest.raises(ValueError, match="left out"):
        kept([0.0, rate], torch.zeros(1, 2))
