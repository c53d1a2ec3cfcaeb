"""Drawing from the top-k, top-p part of a distribution over many tokens without sorting them (for CPUs).

A token x is drawn from the whole distribution by two-level sums, and accepted if it is inside: if fewer than k tokens
are likelier, and their mass is below p S, where S is the mass of the k likeliest. If it is not, everything as likely as
x or less is outside too, and the next token is drawn from the rest. What is accepted in the end has the filtered
distribution exactly, as in FlashInfer's sampling kernels. A look at x costs a comparison and a sum. S itself would need
a selection, but bounds settle nearly every x: what lies above a value with fewer than k tokens above it is a lower
bound, what lies above any other value an upper one. A subsample says which two values to look at first, and where x
falls between the bounds they are bisected until it does not.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens per partial sum.
CHUNK = 256
#: Every such token is in the subsample. A prime: no digit of a mixed-radix code (FSQ) stands still in it.
STRIDE = 61
#: The values looked at first lie so many standard deviations of the subsample's error above and below the k-th.
DEVIATIONS = 3
#: Weights of logits so far below the largest are 0 in fp32.
NOTHING = 104.0


def draw_by_rejection(logits: Tensor, top_k: int, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 ``(r,)`` from fp32 ``logits`` ``(r, v)`` with ``uniform`` float64 ``(r, tries)`` in [0, 1).

    Ties at the borders are inside. Also returns which rows are left, bool ``(r,)``: no try was accepted, and their
    token is void.
    """
    v = logits.shape[-1]
    if v % CHUNK:
        logits = F.pad(logits, (0, -v % CHUNK), value=float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    rows = _Rows.of(logits, weights, uniform, largest.squeeze(-1), top_k)
    token = torch.empty_like(rows.number)
    left = torch.ones_like(token, dtype=torch.bool)
    if top_k == v and top_p == 1:
        return rows.draw(0), ~left
    if top_k < v:
        rows.low = torch.zeros_like(rows.low)
        for value in _around_kth(logits, v, top_k):
            inside, sums = rows.look(value)
            rows.exclude(~inside, value, sums)
    for attempt in range(uniform.shape[-1]):
        drawn = rows.draw(attempt)
        value = rows.logits.gather(-1, drawn[:, None]).squeeze(-1)
        inside, sums = rows.look(value)
        if top_p < 1:
            inside &= rows.below_share(sums.sum(-1), top_p)
        token[rows.number[inside]] = drawn[inside]
        left[rows.number[inside]] = False
        if inside.all():
            break
        rows.exclude(~inside, value, sums)
        rows = rows[~inside]
    return token, left


@dataclass
class _Rows:
    """Rows ``(r,)`` that have no token yet."""

    number: Tensor  # (r,) which ones
    logits: Tensor  # (r, v)
    weights: Tensor  # (r, v) proportional to probabilities
    uniform: Tensor  # (r, tries)
    sums: Tensor  # (r, v / CHUNK) of the weights of tokens that are not excluded
    excluded: Tensor  # (r,) tokens with this logit or less are known to be outside
    low: Tensor  # (r,) bounds of S
    high: Tensor
    above: Tensor  # (r,) the least logit known to be among the k likeliest
    below: Tensor  # (r,) the largest one known not to be
    top_k: int
    scratch: Tensor  # (at least r, v): new memory for every look would cost more than the look

    @classmethod
    def of(cls, logits: Tensor, weights: Tensor, uniform: Tensor, largest: Tensor, top_k: int) -> "_Rows":
        sums = _chunk_sums(weights)
        mass, excluded = sums.sum(-1), torch.full_like(largest, -torch.inf)
        number = torch.arange(len(logits))
        # All that matters of logits below ``largest - NOTHING`` is that they have no mass.
        bounds = (mass, mass, largest, largest - NOTHING)
        return cls(number, logits, weights, uniform, sums, excluded, *bounds, top_k, torch.empty_like(weights))

    def __getitem__(self, kept: Tensor) -> "_Rows":
        kept_of = {f.name: getattr(self, f.name)[kept] for f in fields(self) if f.name not in ("top_k", "scratch")}
        return replace(self, **kept_of)

    def draw(self, attempt: int) -> Tensor:
        """Tokens ``(r,)`` that are not excluded, by their weights: first the chunk, then the token in it."""
        chunk, rest = _invert(self.sums, self.uniform[:, attempt])
        index = chunk[:, None] * CHUNK + torch.arange(CHUNK)
        excluded = self.logits.gather(-1, index) <= self.excluded[:, None]
        return chunk * CHUNK + _invert(self.weights.gather(-1, index).masked_fill(excluded, 0), rest)[0]

    def look(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Whether fewer than ``top_k`` tokens are above ``value`` ``(r,)``, and the ``sums`` of those; bounds S."""
        higher = torch.gt(self.logits, value[:, None], out=self.scratch[: len(value)])
        inside = higher.sum(-1) < self.top_k
        sums = _chunk_sums(higher.mul_(self.weights))
        mass = sums.sum(-1)
        self.low = torch.where(inside, torch.maximum(self.low, mass), self.low)
        self.high = torch.where(inside, self.high, torch.minimum(self.high, mass))
        self.above = torch.where(inside, torch.minimum(self.above, value), self.above)
        self.below = torch.where(inside, self.below, torch.maximum(self.below, value))
        return inside, sums

    def exclude(self, rows: Tensor, value: Tensor, sums: Tensor) -> None:
        """Of the ``rows``, bool ``(r,)``, tokens at or below ``value``; ``sums`` are those of the tokens above it."""
        self.excluded = torch.where(rows, value, self.excluded)
        self.sums = torch.where(rows[:, None], sums, self.sums)

    def below_share(self, mass: Tensor, top_p: float) -> Tensor:
        """Whether ``mass`` ``(r,)`` above the values looked at last is below ``top_p`` of S."""
        while (unclear := (mass >= top_p * self.low) & (mass < top_p * self.high)).any():
            part = self[unclear]
            part.bisect()
            self.low[unclear], self.high[unclear] = part.low, part.high
            self.above[unclear], self.below[unclear] = part.above, part.below
        return mass < top_p * self.low

    def bisect(self) -> None:
        """Looks at a value between the bounds. Where there is none, the lowest inside is the k-th and S is known."""
        middle = (self.above + self.below) / 2
        between = (middle > self.below) & (middle < self.above)
        self.look(torch.where(between, middle, self.above))
        self.low = torch.where(between, self.low, self.high)


def _chunk_sums(weights: Tensor) -> Tensor:
    return weights.unflatten(-1, (-1, CHUNK)).sum(-1)


def _around_kth(logits: Tensor, v: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Values ``(r,)`` probably a little above and below the ``top_k``-th of ``v``, for each row."""
    ordered = np.sort(logits[:, :v:STRIDE].contiguous().numpy(), axis=-1)
    n, share = ordered.shape[-1], top_k / v
    spread = DEVIATIONS * (n * share * (1 - share)) ** 0.5
    places = (n * (1 - share) + spread, n * (1 - share) - spread)
    return tuple(torch.from_numpy(ordered[:, min(max(round(place), 0), n - 1)].copy()) for place in places)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of ``weights`` ``(r, n)`` passes ``uniform`` ``(r,)``, and how far in, in [0, 1)."""
    cumulative = weights.double().cumsum(-1)
    target = uniform * cumulative[:, -1]
    # right=True skips what has no weight; the end is out of reach, since uniform is below 1.
    index = torch.searchsorted(cumulative, target[:, None], right=True)
    weight = weights.gather(-1, index).double()
    rest = 1 - (cumulative.gather(-1, index) - target[:, None]) / weight
    return index.squeeze(-1), rest.squeeze(-1).clamp(min=0)  # rounding may take it below 0, but not to 1
