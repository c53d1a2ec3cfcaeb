"""How sparse weights are, and what codes they use (Chen et al., arXiv:2312.03406, sections 5.3 and C.1).

All is said of a tensor standardised by its own mean and standard deviation. The weights of a test set have K values for
each of millions of locations and are never there at once: they come in chunks, ``(n, K)`` each, and are gone through
twice, first for mean and standard deviation, then for what depends on them. Rows are summed in fp32, or their own
type if that is wider, and across rows in fp64.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stpredict.quantizers.code_use import perplexity

THRESHOLDS = (2.0, 3.0)  # the paper's, in standard deviations
BINS, LIMIT = 160, 8.0  # of a density, which reaches so many standard deviations to both sides

Chunks = Callable[[], Iterable[Tensor]]


@dataclass
class Spread:
    """Of all values of a tensor ``(n, K)``, of any number of rows."""

    rows: int
    mean: float
    sd: float  # with n - 1, as torch's
    kurtosis: float  # excess over a normal distribution's, whose is 0; biased, as scipy's default
    zeros: float  # share of values that are exactly 0
    edges: Tensor  # fp64 (bins + 1,), of the bins
    histogram: Tensor  # int64 (bins,): standardised values in each; the last bin holds its upper edge too
    active: dict[float, Tensor]  # threshold → int64 (K,): how often a standardised value of the column is beyond it

    @property
    def values(self) -> int:
        return self.rows * len(next(iter(self.active.values())))

    @property
    def density(self) -> Tensor:
        """Per standard deviation, fp64 (bins,): what lies outside of the edges counts in the whole."""
        return self.histogram.double() / self.values / self.edges.diff()

    def active_perplexity(self, threshold: float) -> float:
        """Of p_k, code k's part in all that is active; 0 where nothing is."""
        active = self.active[threshold]
        return perplexity(active) if active.any() else 0.0

    def active_share(self, threshold: float) -> float:
        """Of all values."""
        return float(self.active[threshold].sum()) / self.values

    def codes_active(self, threshold: float) -> int:
        """Columns that are active at least once."""
        return int((self.active[threshold] > 0).sum())


class SpreadCounter:
    """Makes a :class:`Spread` of chunks ``(n, K)``: each is to be seen once, and when all have been, each again."""

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS, bins: int = BINS, limit: float = LIMIT):
        self._limit = limit
        self._rows = self._rows_again = self._count = self._zeros = 0
        self._mean = self._squares = self._fourth = 0.0
        self._histogram = torch.zeros(bins, dtype=torch.int64)
        self._active: dict[float, Tensor] = dict.fromkeys(thresholds, torch.zeros((), dtype=torch.int64))

    def see(self, chunk: Tensor) -> None:
        x = _precise(chunk)
        here, mean = x.numel(), _sum(x) / x.numel()
        # Chan, Golub & LeVeque (1983): exact where the mean is large beside the spread.
        apart, total = mean - self._mean, self._count + here
        self._squares += _sum((x - mean).square_()) + apart**2 * self._count * here / total
        self._mean += apart * here / total
        self._count, self._rows = total, self._rows + len(x)
        self._zeros += here - int(x.count_nonzero())

    def see_again(self, chunk: Tensor) -> None:
        """ValueError where nothing can be standardised: less than two values, or all of them equal."""
        if self._count < 2 or self._squares == 0:
            raise ValueError(f"{self._count} values, all equal: nothing can be standardised")
        z = (_precise(chunk) - self._mean).div_(self._sd)
        self._rows_again += len(z)
        self._fourth += _sum(z.square().square_())
        bins = len(self._histogram)
        self._histogram += z.histc(bins, -self._limit, self._limit).long().cpu()
        z.abs_()
        for threshold in self._active:
            # Of floats, since sums of booleans down the columns take four times as long.
            beyond = (z > threshold).to(z.dtype).sum(0).long().cpu()
            self._active[threshold] = self._active[threshold] + beyond

    def spread(self) -> Spread:
        """ValueError where not all that was seen was seen again."""
        if self._rows_again != self._rows:
            raise ValueError(f"{self._rows} rows the first time, {self._rows_again} the second")
        kurtosis = self._fourth * self._sd**4 * self._count / self._squares**2 - 3
        zeros = self._zeros / self._count
        edges = torch.linspace(-self._limit, self._limit, len(self._histogram) + 1, dtype=torch.float64)
        return Spread(self._rows, self._mean, self._sd, kurtosis, zeros, edges, self._histogram, dict(self._active))

    @property
    def _sd(self) -> float:
        return (self._squares / (self._count - 1)) ** 0.5


def spread(chunks: Chunks, thresholds: Sequence[float] = THRESHOLDS, bins: int = BINS, limit: float = LIMIT) -> Spread:
    """Of the tensor whose rows the chunks ``(n, K)`` are. ``chunks`` is called twice and must give the same both times,
    else ValueError; so too where nothing can be standardised."""
    counter = SpreadCounter(thresholds, bins, limit)
    for chunk in chunks():
        counter.see(chunk)
    for chunk in chunks():
        counter.see_again(chunk)
    return counter.spread()


def _precise(chunk: Tensor) -> Tensor:
    return chunk.to(torch.promote_types(chunk.dtype, torch.float32))


def _sum(x: Tensor) -> float:
    return float(x.sum(1).double().sum())
