"""The compute-optimal frontier: which size is best at each C, and how the best size and its tokens grow with C.

Where the learning rate is constant, every point of a curve is a run of that length, so the losses of all sizes at one
C can be read off their curves; otherwise runs are compared that were laid out for the same C (approach 2 of Hoffmann
et al., arXiv:2203.15556). The lower envelope names a size of the study; a parabola in ln N through the best and its
neighbours names the optimum between them. Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stpredict.studies.analysis import FrontierPoint, IsoFlop, Law, NotFitted, SlicePoint
from stpredict.studies.bootstrap import WEBB, scales
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.law import Fitted, Noise, fit_law
from stpredict.studies.measured import Measured, Samples, by_size
from stpredict.studies.power_law import fit_power_law

ENVELOPE_PLACES = 40
SLICES = 8  # of the curves, that parabolas are put through
NEIGHBOURS = 2  # on each side of the best size: a parabola is no good for more than the bottom
MOSTLY = 0.9  # of the draws must have all minima for an interval
EQUAL = 0.05  # runs whose C differs by less are at one C: steps are whole numbers


@dataclass
class Slices:
    """Mean losses of the sizes (ascending) at several C, (sizes, places); NaN where a size has none.

    ``noisy`` (draws, sizes, places): what they might have been with other seeds, None where a size has but one run.
    """

    sizes: list[str]
    names: list[tuple[str, ...]]  # of every size, its runs
    n: np.ndarray
    c: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray
    noisy: np.ndarray | None = None

    def winners(self) -> np.ndarray:
        """Of every place the best size."""
        return np.nanargmin(self.losses, axis=0)

    def at_edge(self) -> np.ndarray:
        """Of every place, whether the best is the smallest or the largest of the sizes there."""
        there = np.isfinite(self.losses)
        first, last = there.argmax(axis=0), len(there) - 1 - there[::-1].argmax(axis=0)
        return (self.winners() == first) | (self.winners() == last)


@dataclass
class Frontier:
    points: list[FrontierPoint]
    iso_flops: list[IsoFlop]
    laws: list[Fitted | Law | NotFitted]


def frontier(runs: Sequence[Measured], analysis: AnalysisConfig) -> Frontier:
    if any(run.flops_per_step is None for run in runs):
        return _without("the models' FLOPs could not be counted")
    curves = analysis.points == "curve"
    slices = slices_of_curves(runs, analysis) if curves else slices_of_runs(runs)
    if slices is None:
        where = "curves overlap in C" if curves else "runs were laid out for the same C and other numbers of tokens"
        return _without(f"there are no three sizes whose {where}")
    winners, edges = slices.winners(), slices.at_edge()
    points = [
        FrontierPoint(
            flops=float(c),
            parameters=float(slices.n[best]),
            tokens=float(slices.tokens[best, i]),
            loss=float(slices.losses[best, i]),
            size=slices.sizes[best],
            edge=bool(edge),
        )
        for i, (c, best, edge) in enumerate(zip(slices.c, winners, edges, strict=True))
    ]
    wide = np.flatnonzero(np.isfinite(slices.losses).sum(axis=0) >= 3)
    chosen = wide[np.unique(np.linspace(0, len(wide) - 1, SLICES).round().astype(int))] if curves else wide
    slots = [_iso_flop(slices, i, analysis.points) for i in chosen]
    laws = [*_optima(slices, chosen, slots, analysis), _loss_law(slices, points, slots, analysis)]
    return Frontier(points, slots, laws)


def slices_of_curves(runs: Sequence[Measured], analysis: AnalysisConfig) -> Slices | None:
    """At log-spaced C, from the first to the last at which three sizes have a point; None if there is none."""
    sizes = by_size(runs)
    spans = []
    for members in sizes.values():
        first = max(run.steps[0] * run.flops_per_step for run in members)
        spans.append((first, min(run.flops for run in members)))
    if len(sizes) < 3:
        return None
    first, last = sorted(low for low, _ in spans)[2], sorted(high for _, high in spans)[-3]
    if first >= last:
        return None
    c = np.geomspace(first, last, ENVELOPE_PLACES)
    there = [sum(low <= here <= high for low, high in spans) for here in c]
    if max(there) < 3:
        return None
    c = c[np.array(there) > 0]  # between small sizes and large ones there may be none
    tables = [
        np.stack([run.log_loss_at(c / run.flops_per_step * run.tokens_per_step) for run in members])
        for members in sizes.values()
    ]
    means = np.stack([table.mean(axis=0) for table in tables])
    noisy = None
    if all(len(table) > 1 for table in tables) and analysis.bootstrap:
        noisy = np.exp(means + _other_seeds(tables, analysis.bootstrap))
    return Slices(
        sizes=list(sizes),
        names=[tuple(run.name for run in members) for members in sizes.values()],
        n=np.array([members[0].n for members in sizes.values()]),
        c=c,
        losses=np.exp(means),
        tokens=np.stack([c / m[0].flops_per_step * m[0].tokens_per_step for m in sizes.values()]),
        noisy=noisy,
    )


def slices_of_runs(runs: Sequence[Measured]) -> Slices | None:
    """From the last points of runs of three sizes or more at one C; None if there are none such."""
    groups: list[list[Measured]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if groups and run.flops <= groups[-1][0].flops * (1 + EQUAL):
            groups[-1].append(run)
        else:
            groups.append([run])
    groups = [group for group in groups if len({run.size for run in group}) >= 3]
    if not groups:
        return None
    sizes = by_size(runs)
    shape = len(sizes), len(groups)
    losses, tokens = np.full(shape, np.nan), np.full(shape, np.nan)
    for j, group in enumerate(groups):
        for i, size in enumerate(sizes):
            if members := [run for run in group if run.size == size]:
                losses[i, j] = np.mean([run.loss for run in members])
                tokens[i, j] = np.mean([run.tokens for run in members])
    return Slices(
        sizes=list(sizes),
        names=[tuple(run.name for run in members) for members in sizes.values()],
        n=np.array([members[0].n for members in sizes.values()]),
        c=np.array([np.exp(np.mean([np.log(run.flops) for run in group])) for group in groups]),
        losses=losses,
        tokens=tokens,
    )


def _other_seeds(tables: list[np.ndarray], draws: int) -> np.ndarray:
    """(draws, sizes, places): how else the mean of each size's curves (runs, places) might have lain. Each run's
    distance from its size's mean gets one random weight (see bootstrap.py)."""
    random = np.random.default_rng(0)
    scale = scales(draws, sum(len(table) - 1 for table in tables), random)
    shifts = []
    for table in tables:
        apart = (table - table.mean(axis=0)) * np.sqrt(1 / (len(table) * (len(table) - 1)))
        weights = WEBB[random.integers(len(WEBB), size=(draws, len(table)))] * scale[:, None]
        shifts.append(weights @ apart)
    return np.stack(shifts, axis=1)


def _around(losses: np.ndarray) -> np.ndarray | None:
    """The sizes that a parabola is put through; None where the least is at an end."""
    there = np.flatnonzero(np.isfinite(losses))
    best = int(losses[there].argmin())
    if best in (0, len(there) - 1):
        return None
    return there[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]


def _iso_flop(slices: Slices, i: int, source: str) -> IsoFlop:
    column = slices.losses[:, i]
    points = [
        SlicePoint(size=slices.sizes[k], parameters=slices.n[k], tokens=slices.tokens[k, i], loss=column[k])
        for k in np.flatnonzero(np.isfinite(column))
    ]
    around = _around(column)
    facts = {"flops": float(slices.c[i]), "source": source, "points": points}
    if around is None:
        best = slices.sizes[int(np.nanargmin(column))]
        why = f"the best, {best}, is at an end: the optimum may lie beyond it"
        return IsoFlop(**facts, parabola=None, optimum=None, why_not=why)
    u = np.log(slices.n[around])
    square, slope, level = np.polyfit(u - u.mean(), column[around], 2)
    if square <= 0:
        return IsoFlop(**facts, parabola=None, optimum=None, why_not="the losses have no minimum between the sizes")
    vertex = u.mean() - slope / (2 * square)
    if not u.min() <= vertex <= u.max():
        return IsoFlop(**facts, parabola=None, optimum=None, why_not="the parabola's vertex is outside the sizes")
    optimum = SlicePoint(
        size="",
        parameters=float(np.exp(vertex)),
        tokens=float(np.exp(np.interp(vertex, u, np.log(slices.tokens[around, i])))),
        loss=float(level - slope**2 / (4 * square)),
    )
    m = u.mean()
    parabola = (float(level - slope * m + square * m * m), float(slope - 2 * square * m), float(square))
    return IsoFlop(**facts, parabola=parabola, optimum=optimum)


def _optima(
    slices: Slices, chosen: np.ndarray, slots: list[IsoFlop], analysis: AnalysisConfig
) -> list[Law | NotFitted]:
    """N_opt(C) and D_opt(C) from the parabolas' vertices."""
    good = [(i, slot) for i, slot in zip(chosen, slots, strict=True) if slot.optimum]
    if len(good) < 3:
        why = f"{len(good)} of {len(slots)} C with a minimum between the sizes; a fit takes three or more"
        return [NotFitted(name=name, of="parabolas", why=why) for name in ("N_opt(C)", "D_opt(C)")]
    c = np.array([slot.flops for _, slot in good])
    n_opt = np.array([slot.optimum.parameters for _, slot in good])
    d_opt = np.array([slot.optimum.tokens for _, slot in good])
    draws, how = (None, None), ""
    if analysis.points == "curve":
        if slices.noisy is None:
            how = "points of the same curves are not independent, and there are sizes of one run"
        else:
            draws, how = _redrawn(slices, [i for i, _ in good])
    source = "the vertices of parabolas in ln N " + (
        "through the curves' losses at one C" if analysis.points == "curve" else "through runs of the same C"
    )
    options = {"analysis": analysis, "of": "parabolas", "source": source, "how": how}
    return [
        fit_power_law("N_opt(C)", c, n_opt, draws=draws[0], **options),
        fit_power_law("D_opt(C)", c, d_opt, draws=draws[1], **options),
    ]


def _redrawn(slices: Slices, places: list[int]) -> tuple[tuple[np.ndarray | None, np.ndarray | None], str]:
    """N_opt and D_opt, (draws, places), of the draws whose parabolas all have a minimum. One that is beyond the sizes
    of its parabola counts, as far as these are apart: leaving such draws out would make the interval too short."""
    n_opt, d_opt = [], []
    for i in places:
        around = _around(slices.losses[:, i])
        u, log_d = np.log(slices.n[around]), np.log(slices.tokens[around, i])
        square, slope, _ = np.polyfit(u - u.mean(), slices.noisy[:, around, i].T, 2)
        square = np.where(square > 0, square, np.nan)
        reach = u.max() - u.min()
        vertex = np.clip(u.mean() - slope / (2 * square), u.min() - reach, u.max() + reach)
        n_opt.append(np.exp(vertex))
        d_opt.append(np.exp(np.polyval(np.polyfit(u, log_d, 1), vertex)))
    whole = np.isfinite(n_opt).all(axis=0)
    if whole.mean() < MOSTLY:
        return (None, None), f"with other seeds, a C has no minimum in {1 - whole.mean():.0%} of the draws"
    how = f"seeds' distances from their size's mean curve under Webb's weights, {whole.sum()} draws"
    return (np.stack(n_opt, axis=1)[whole], np.stack(d_opt, axis=1)[whole]), how


def _loss_law(
    slices: Slices, points: list[FrontierPoint], slots: list[IsoFlop], analysis: AnalysisConfig
) -> Fitted | NotFitted:
    """L(C): along the envelope where sizes on both sides are worse, or through the minima of the parabolas."""
    if analysis.points == "curve":
        places = [i for i, point in enumerate(points) if not point.edge]
        sizes = {points[i].size for i in places}
        if len(sizes) < 2 or len(places) < 5:
            why = f"the best size is the smallest or the largest at {len(points) - len(places)} of {len(points)} C"
            return NotFitted(name="L(C)", why=f"{why}: the sizes do not enclose the optimum over a range of C")
        best = slices.winners()[places]
        noisy = None if slices.noisy is None else np.log(slices.noisy[:, best, places])
        samples = Samples(
            n=slices.n[best],
            d=slices.tokens[best, places],
            c=slices.c[places],
            loss=slices.losses[best, places],
            run=best,
            names=[slices.names[k] for k in best],
            sizes=[slices.sizes[k] for k in best],
        )
        noise = Noise(
            copies=noisy,
            how="seeds' distances from their size's mean curve",
            none="there are sizes of one run: nothing says how another seed would differ",
        )
        return fit_law("L(C)", samples, analysis, noise, source="the lower envelope of the sizes' mean curves")
    optima = [slot for slot in slots if slot.optimum]
    if len(optima) < 3:
        return NotFitted(
            name="L(C)", why=f"{len(optima)} C with a minimum between the sizes; a fit takes three or more"
        )
    samples = Samples(
        n=np.array([slot.optimum.parameters for slot in optima]),
        d=np.array([slot.optimum.tokens for slot in optima]),
        c=np.array([slot.flops for slot in optima]),
        loss=np.array([slot.optimum.loss for slot in optima]),
        run=np.arange(len(optima)),
        names=[()] * len(optima),
        sizes=[""] * len(optima),
    )
    return fit_law("L(C)", samples, analysis, Noise(len(optima) - 3), source="the minima of the parabolas")


def _without(why: str) -> Frontier:
    names = (("L(C)", ""), ("N_opt(C)", "parabolas"), ("D_opt(C)", "parabolas"))
    return Frontier([], [], [NotFitted(name=name, of=of, why=why) for name, of in names])
