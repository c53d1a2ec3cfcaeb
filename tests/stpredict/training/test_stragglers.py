"""Who is named as slow, from times as the ranks would measure them."""

from types import SimpleNamespace

import pytest
import torch

from stpredict.training.stragglers import IN_A_ROW, Stragglers

FAST = {"data": 0.1, "forward": 1.0, "device": 0.01}


def said(changes: list[dict[str, float]], factor: float = 1.5) -> list[str]:
    """What is said over intervals of 10 s in which rank 1 of three differs from the others by ``changes``."""
    interval = iter(changes)

    def gather(mine):
        host, elapsed_s, _ = mine
        slow = {**FAST, **next(interval)}
        return [(host, elapsed_s, FAST), ("slowhost", elapsed_s, slow), (host, elapsed_s, FAST)]

    ranks = SimpleNamespace(size=3, device=torch.device("cpu"), gather=gather)
    stragglers = Stragglers(ranks, factor, zero_stage=2)
    return [line for _ in changes for line in stragglers.compare(0.1, 10.0)]


@pytest.mark.parametrize(
    ("kind", "slow", "words"),
    [
        ("data", 2.0, "waiting for data: 2 s, median 0.1 s"),
        ("forward", 3.0, "its forward passes: 3 s, median 1 s"),
        ("device", 0.02, "its device (a small matrix product): 0.02 s, median 0.01 s"),
    ],
)
def test_a_rank_is_named_with_what_is_slow_once_after_intervals_in_a_row(kind, slow, words):
    (line,) = said([{kind: slow}] * 10)
    assert line == f"rank 1 on slowhost is slower than the others, by {words}, {IN_A_ROW} log lines in a row"
    assert said([{kind: slow}] * (IN_A_ROW - 1)) == []
    assert said(([{kind: slow}] * (IN_A_ROW - 1) + [{}]) * 3) == []  # not in a row
    assert len(said(([{kind: slow}] * IN_A_ROW + [{}]) * 2)) == 2  # slow anew


@pytest.mark.parametrize("times", [{"data": 0.9}, {"forward": 1.4}, {"device": 0.014}])
def test_less_than_the_factor_or_a_tenth_of_the_time_is_not_slow(times):
    assert said([times] * 10) == []
