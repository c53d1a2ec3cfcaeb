"""The best learning rate of every size, and how it goes with size. Torch-free."""

from collections.abc import Collection, Sequence

import numpy as np

from stpredict.studies.analysis import BestLearningRate, Law, LearningRate, NotFitted
from stpredict.studies.config import AnalysisConfig
from stpredict.studies.measured import Measured
from stpredict.studies.power_law import fit_power_law


def best_learning_rates(
    runs: Sequence[Measured], diverged: Collection[tuple[str, str, float]] = ()
) -> list[BestLearningRate]:
    """Of every size (and amount of data, where that is an axis) of which several learning rates were tried.
    ``diverged``: size, data and learning rate of the runs that did."""
    found = []
    for members in _alike(runs):
        rates = sorted({run.lr for run in members if run.lr is not None})
        if len(rates) < 2:
            continue
        tried = [_tried(rate, [run.loss for run in members if run.lr == rate]) for rate in rates]
        best = min(range(len(tried)), key=lambda i: tried[i].loss)
        inside = 0 < best < len(tried) - 1
        place = members[0].size, members[0].data
        beyond = [lr for *at, lr in diverged if (*at,) == place and lr > rates[best]] if best == len(tried) - 1 else []
        found.append(
            BestLearningRate(
                size=members[0].size,
                of=members[0].data,
                parameters=members[0].n,
                tried=tried,
                best=rates[best],
                vertex=_vertex(tried[best - 1 : best + 2]) if inside else None,
                at_edge=not inside and not beyond,
                diverges_at=min(beyond, default=None),
            )
        )
    return found


def at_best(run: Measured, found: Sequence[BestLearningRate]) -> bool:
    """Only such runs are part of the laws."""
    own = next((best for best in found if (best.size, best.of) == (run.size, run.data)), None)
    return own is None or run.lr == own.best


def learning_rate_law(found: Sequence[BestLearningRate], analysis: AnalysisConfig) -> list[Law | NotFitted]:
    """lr*(N), of each amount of data."""
    results: list[Law | NotFitted] = []
    for of in sorted({best.of for best in found}):
        inside = [best for best in found if best.of == of and best.vertex is not None]
        if len({best.parameters for best in inside}) < 3:
            edges = [best.size for best in found if best.of == of and best.at_edge]
            why = f"{len(inside)} sizes with a best learning rate inside the grid; a fit takes three or more"
            if edges:
                why += f" (at the grid's edge: {', '.join(edges)}; widen the grid there)"
            if bounded := [best.size for best in found if best.of == of and best.diverges_at]:
                why += f" (the next larger rate diverges: {', '.join(bounded)}; try some between)"
            results.append(NotFitted(name="lr(N)", of=of, why=why))
            continue
        n, rates = (
            np.array(values) for values in zip(*[(best.parameters, best.vertex) for best in inside], strict=True)
        )
        source = "the parabolas' vertices"
        results.append(fit_power_law("lr(N)", n, rates, analysis, of=of, source=source, reach=analysis.predict))
    return results


def _alike(runs: Sequence[Measured]) -> list[list[Measured]]:
    groups: dict[tuple[str, str], list[Measured]] = {}
    for run in sorted(runs, key=lambda run: run.n):
        groups.setdefault((run.size, run.data), []).append(run)
    return list(groups.values())


def _tried(rate: float, losses: list[float]) -> LearningRate:
    spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    return LearningRate(learning_rate=rate, loss=float(np.mean(losses)), spread=spread, seeds=len(losses))


def _vertex(three: Sequence[LearningRate]) -> float:
    """Where the parabola in ln lr through three learning rates, the middle one the best, is least."""
    rates = np.log([one.learning_rate for one in three])
    square, slope, _ = np.polyfit(rates - rates[1], [one.loss for one in three], 2)
    return float(np.exp(rates[1] - slope / (2 * square))) if square > 0 else three[1].learning_rate
