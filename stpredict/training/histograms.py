"""Histograms of the weights and of the gradient's running mean (exp_avg), per parameter, whatever the ZeRO stage.

Every rank counts the ranges that it alone owns, in bins that all share; counts are then summed. So each element counts
once, and the counts are those of the whole tensor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stpredict.training.pieces import Piece
from stpredict.training.ranks import Ranks

KINDS = ("weight", "exp_avg")
# Upper ends of the bins: eighths of powers of two from 2**-40 to 2**20, for either sign, and 0.
_POSITIVE = torch.exp2(torch.arange(-320, 161, dtype=torch.float64) / 8).float()
EDGES = torch.cat([-_POSITIVE.flip(0), torch.zeros(1), _POSITIVE])
CHUNK = 2**24  # elements counted at once: the numbers of their bins take memory


@dataclass(frozen=True)
class Histogram:
    """Of the finite elements: ``counts[i]`` of them are above ``EDGES[i - 1]`` and at most ``EDGES[i]``; the last
    count is of those above all edges."""

    counts: list[int]
    least: float
    most: float
    sum: float
    sum_of_squares: float

    @property
    def elements(self) -> int:
        return sum(self.counts)


def histograms(pieces: Iterable[Piece], keys: Sequence[str], ranks: Ranks) -> dict[str, Histogram]:
    """Those of the tensors ``keys``, on every rank, from what each rank owns of them; the keys that nobody has any of
    are left out. On all ranks with the same keys."""
    row = {key: number for number, key in enumerate(keys)}
    counts = torch.zeros(len(keys), len(EDGES) + 1, dtype=torch.int64)
    sums = torch.zeros(len(keys), 2, dtype=torch.float64)
    ends = torch.full((len(keys), 2), -torch.inf, dtype=torch.float64)  # of -x and of x
    for piece in pieces:
        if piece.key in row:
            for chunk in piece.tensor.detach().split(CHUNK):
                _count(chunk, *(table[row[piece.key]] for table in (counts, sums, ends)))
    ranks.sum(counts)
    ranks.sum(sums)
    ranks.max(ends)
    return {
        key: Histogram(counts[n].tolist(), -ends[n, 0].item(), ends[n, 1].item(), *sums[n].tolist())
        for key, n in row.items()
        if counts[n].any()
    }


def _count(values: Tensor, counts: Tensor, sums: Tensor, ends: Tensor) -> None:
    values = values[values.isfinite()].float()
    if not values.numel():
        return
    bins = torch.bucketize(values, EDGES.to(values.device), out_int32=True)
    counts += torch.bincount(bins, minlength=len(counts)).cpu()
    sums += torch.stack([values.sum(dtype=torch.float64), values.double().square().sum()]).cpu()
    ends.copy_(torch.maximum(ends, torch.stack([-values.min(), values.max()]).double().cpu()))
