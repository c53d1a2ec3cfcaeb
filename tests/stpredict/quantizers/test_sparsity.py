"""Sparsity in chunks against numpy and scipy on the whole tensor."""

import numpy as np
import pytest
import torch
from scipy import stats

from stpredict.quantizers.sparsity import spread

ROWS, CODES = 57, 12


def weights() -> torch.Tensor:
    """Heavy tails, a mean far from 0, codes of different use, and some zeros."""
    generator = np.random.default_rng(0)
    values = generator.standard_t(4, size=(ROWS, CODES)) * np.linspace(0.2, 3, CODES) + 500
    values[::9, 3] = 0
    return torch.from_numpy(values)


@pytest.mark.parametrize("rows", [1, 10, 57])
def test_moments_kurtosis_and_zeros_are_those_of_the_whole(rows):
    whole = weights()
    found = spread(lambda: whole.split(rows))
    assert found.rows == ROWS
    assert found.values == ROWS * CODES
    assert found.mean == pytest.approx(whole.mean().item(), rel=1e-12)
    assert found.sd == pytest.approx(whole.std().item(), rel=1e-12)
    assert found.kurtosis == pytest.approx(stats.kurtosis(whole.numpy(), axis=None), rel=1e-10)
    assert found.zeros == (whole == 0).double().mean().item() > 0


def test_a_normal_distribution_has_no_excess_kurtosis():
    sample = torch.randn(1000, 500, generator=torch.Generator().manual_seed(0))
    assert spread(lambda: sample.split(100)).kurtosis == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("rows", [10, 57])
def test_active_codes_and_their_perplexity_are_the_papers(rows):
    whole = weights()[:, 4:]
    found = spread(lambda: whole.split(rows), thresholds=(1.5, 2, 3))
    z = np.abs((whole.numpy() - whole.numpy().mean()) / whole.numpy().std(ddof=1))
    for threshold in (1.5, 2, 3):
        counts = (z > threshold).sum(0)
        assert found.active[threshold].tolist() == counts.tolist()
        assert found.active_perplexity(threshold) == pytest.approx(np.exp(stats.entropy(counts)), rel=1e-12)
        assert found.active_share(threshold) == pytest.approx((z > threshold).mean())
        assert found.codes_active(threshold) == (counts > 0).sum()


def test_nothing_active_has_no_perplexity():
    found = spread(lambda: [torch.tensor([[1.0, -1.0], [-1.0, 1.0]])], thresholds=(2,))
    assert found.active_perplexity(2) == 0
    assert found.active_share(2) == 0


def test_densities_are_numpys_and_count_what_lies_outside():
    whole = torch.cat([weights()[:, 4:].flatten(), torch.tensor([2000.0], dtype=torch.float64)])[:, None]
    edges = np.linspace(-4, 4, 17)
    found = spread(lambda: whole.split(10), bins=16, limit=4)
    z = ((whole - whole.mean()) / whole.std()).numpy()
    assert found.histogram.tolist() == np.histogram(z, edges)[0].tolist()
    np.testing.assert_allclose(found.density.numpy(), np.histogram(z, edges)[0] / len(z) / np.diff(edges))
    assert (found.density * found.edges.diff()).sum() < 1
    normal = spread(lambda: [torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))])
    middle = (normal.edges[1:] + normal.edges[:-1]) / 2
    assert np.abs(normal.density.numpy() - stats.norm.pdf(middle.numpy())).max() < 0.02


def test_the_last_edge_belongs_to_the_last_bin():
    whole = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    assert spread(lambda: [whole], bins=2, limit=0.5**0.5).histogram.tolist() == [1, 1]


def test_fp32_and_bf16_are_counted_as_precisely_as_they_are():
    whole = weights()[:, 4:] - 500
    exact = spread(lambda: whole.split(10))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        found = spread(lambda dtype=dtype: whole.to(dtype).split(10))
        assert found.sd == pytest.approx(exact.sd, rel=tolerance)
        assert found.kurtosis == pytest.approx(exact.kurtosis, rel=10 * tolerance)


def test_what_cannot_be_standardised_is_refused():
    with pytest.raises(ValueError, match="all equal"):
        spread(lambda: [torch.ones(4, 2)])
    parts = iter([[torch.randn(4, 2)], [torch.randn(3, 2)]])
    with pytest.raises(ValueError, match="4 rows the first time, 3 the second"):
        spread(lambda: next(parts))
