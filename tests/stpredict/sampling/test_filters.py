import pytest
import torch

from stpredict.sampling.config import SamplingConfig
from stpredict.sampling.filters import draw, probabilities

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.325, 0.04 / 0.325, 0.0225 / 0.325, 0.01 / 0.325, 0.0025 / 0.325]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
        ({"top_k": 9}, [0.5, 0.2, 0.15, 0.1, 0.05]),
        ({"top_p": 0.6}, [5 / 7, 2 / 7, 0, 0, 0]),  # 0.5 does not reach 0.6, 0.7 does
        ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [5 / 7, 2 / 7, 0, 0, 0]),  # of 0.85 left, 0.7 is 82 %
    ],
    ids=str,
)
def test_filters_against_closed_forms(config, expected):
    torch.testing.assert_close(
        probabilities(LOGITS, SamplingConfig(**config)), torch.tensor(expected, dtype=torch.float32)
    )


def test_drawing_inverts_the_cumulative_distribution():
    probability = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(6, 6)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999999])
    assert draw(probability, uniform).tolist() == [1, 1, 3, 3, 4, 4]


def test_drawn_frequencies_follow_the_distribution():
    probability = torch.tensor([0.1, 0.6, 0.3])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(draw(probability.expand(20_000, 3), uniform), minlength=3) / 20_000
    torch.testing.assert_close(share, probability, rtol=0, atol=0.015)
