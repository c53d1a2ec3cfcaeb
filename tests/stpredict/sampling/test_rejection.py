import math

import pytest
import torch
from scipy.stats import chi2

from stpredict.sampling import rejection
from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import TRIES, draw_tokens, probabilities, uniform_numbers
from stpredict.sampling.rejection import draw_by_rejection

DRAWS = 10_000
CONFIGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 1e-4},
    {"top_k": 150, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.5, "temperature": 1.3},
]


@pytest.fixture(params=["normal", "flat", "peaked", "ties", "narrow"])
def logits(request) -> torch.Tensor:
    """(v,), of 600 tokens, which is no multiple of a chunk."""
    generator = torch.Generator().manual_seed(0)
    match request.param:
        case "normal":
            return 2 * torch.randn(600, generator=generator)
        case "flat":
            return 0.01 * torch.randn(600, generator=generator)
        case "peaked":
            return -torch.arange(600.0)[torch.randperm(600, generator=generator)]
        case "ties":
            return torch.randn(600, generator=generator).mul(2).round()
        case "narrow":
            return torch.randn(7, generator=generator)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_drawn_tokens_have_the_filtered_distribution(logits, config):
    """Not one token outside the support, and Pearson's chi-square over all that are expected at least five times."""
    config = SamplingConfig(**config)
    expected = probabilities(logits, config)
    uniform = torch.rand(DRAWS, TRIES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    token = torch.cat([draw_tokens(logits.expand(len(part), -1), config, part) for part in uniform.split(5000)])
    counts = torch.bincount(token, minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    often = expected * DRAWS >= 5
    rest = 1 - expected[often].double().sum()
    cells = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    means = torch.cat([expected[often].double(), rest.clamp(min=0)[None]]) * DRAWS
    cells, means = cells[means > 1e-3], means[means > 1e-3]
    statistic = ((cells - means) ** 2 / means).sum().item()
    assert len(cells) == 1 or chi2.sf(statistic, len(cells) - 1) > 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_drawn_tokens_do_not_depend_on_the_rows_beside_them(config):
    config = SamplingConfig(**config)
    logits = 2 * torch.randn(9, 3000, generator=torch.Generator().manual_seed(0))
    uniform = uniform_numbers(range(9), 1, torch.device("cpu"))[:, 0]
    together = draw_tokens(logits, config, uniform)
    assert torch.equal(together.flip(0), draw_tokens(logits.flip(0), config, uniform.flip(0)))
    assert together.tolist() == [draw_tokens(logits[i : i + 1], config, uniform[i : i + 1]).item() for i in range(9)]


def test_a_sample_has_its_own_uniform_numbers():
    together = uniform_numbers([3, 4], 5, torch.device("cpu"))
    assert together.shape == (2, 5, TRIES)
    assert torch.equal(together[1:], uniform_numbers([4], 5, torch.device("cpu")))
    assert len(together.unique()) == together.numel()
    assert torch.equal(together[:, :3], uniform_numbers([3, 4], 3, torch.device("cpu")))


def test_all_as_likely_as_the_last_stay_in():
    logits = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0]).expand(4000, -1)
    uniform = torch.rand(4000, TRIES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Top-k: the second, third and fourth share the second place. Top-p: e³ / (e³ + 3 e² + e) is 0.45, less than 0.6.
    for config in (SamplingConfig(top_k=2), SamplingConfig(top_p=0.6), SamplingConfig(top_k=2, top_p=0.6)):
        assert set(draw_tokens(logits, config, uniform).tolist()) == {0, 1, 2, 3}
        share = probabilities(logits[0], config)
        torch.testing.assert_close(share[1:4], torch.full((3,), math.exp(2) / (math.exp(3) + 3 * math.exp(2))))


def test_the_ends_of_the_uniform_numbers_are_drawn_from_what_is_inside():
    logits = torch.full((2, 600), float("-inf"))
    logits[:, [300, 301, 511]] = torch.tensor([0.0, 1.0, 0.5])
    uniform = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    token, left = draw_by_rejection(logits, 600, 1.0, uniform)
    assert token.tolist() == [300, 511]
    assert not left.any()


def test_rows_without_an_accepted_try_are_left_and_then_sorted():
    """Each number but the last draws the least likely of the tokens that were not drawn before, and six are outside;
    the last one draws the first of the two inside. As one more try, among three, it would draw the second."""
    logits = torch.tensor([0.3, 0.25, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04]).log().expand(2, -1)
    uniform = torch.tensor([[0.9999] * 5 + [0.5], [0.1] * 6], dtype=torch.float64)
    assert draw_by_rejection(logits, 8, 0.5, uniform[:, :-1])[1].tolist() == [True, False]
    assert draw_tokens(logits, SamplingConfig(top_p=0.5), uniform).tolist() == [0, 0]
    token, left = draw_by_rejection(logits, 8, 0.5, torch.full((2, 7), 0.9999, dtype=torch.float64))
    assert token.tolist() == [1, 1]  # the seventh is the first to draw from those inside alone
    assert not left.any()


@pytest.mark.parametrize("scale", [0.02, 2.0, 4.0])
def test_few_looks_settle_a_token(scale, monkeypatch):
    """With the paper's shares: two looks before the first try, one for each try, and now and then some between bounds,
    where a selection by bisection alone would take 25. No row is left to be sorted."""
    looked = []
    look = rejection._Rows.look
    monkeypatch.setattr(rejection._Rows, "look", lambda rows, value: looked.append(len(value)) or look(rows, value))
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(200, 16_000, generator=generator)
    uniform = torch.rand(200, TRIES - 1, generator=generator, dtype=torch.float64)
    assert not draw_by_rejection(logits, 4000, 0.9, uniform)[1].any()
    assert sum(looked) <= 5.5 * 200
